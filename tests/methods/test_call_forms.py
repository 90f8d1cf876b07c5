"""The call forms of the built-in methods, against their formulas written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import small_models
import torch
import transformers

import distmerge
from distmerge.errors import MismatchError, ParameterError, RecipeError
from distmerge.importance import estimate_fisher, save_importance

SHAPES = {"wide": (40, 63), "long": (301,), "one": (1,)}


def model(seed, near=None):
    draw = torch.Generator().manual_seed(seed)
    noise = {k: torch.randn(shape, generator=draw) for k, shape in SHAPES.items()}
    return noise if near is None else {k: near[k] + 0.1 * noise[k] for k in near}


BASE = model(0)
MODELS = [BASE, model(1, BASE), model(2, BASE), model(3, BASE)]


def doubles(tensors):
    return {k: v.double().numpy() for k, v in tensors.items()}


def deltas():
    """Task vectors in float64, as a list for each key."""
    base = doubles(BASE)
    return {k: [doubles(m)[k] - base[k] for m in MODELS[1:]] for k in base}


def assert_close(found, expected, atol=1e-5):
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        np.testing.assert_allclose(found[key].double().numpy(), value, atol=atol, err_msg=key)


def plus_base(offsets):
    base = doubles(BASE)
    return {k: base[k] + offsets[k] for k in base}


# Formulas ---------------------------------------------------------------------------------------


def test_soup_is_the_mean():
    stacks = {k: np.stack([doubles(m)[k] for m in MODELS]) for k in SHAPES}
    assert_close(distmerge.soup(MODELS), {k: v.mean(0) for k, v in stacks.items()})
    weights = [1.0, 2.0, 3.0, 4.0]
    expected = {k: np.tensordot(weights, v, 1) / 10 for k, v in stacks.items()}
    for given in (weights, tuple(weights), np.array(weights), torch.tensor(weights)):
        assert_close(distmerge.soup(MODELS, weights=given), expected)
    assert_close(distmerge.soup(MODELS, weight=weights), expected)
    summed = {k: np.tensordot(weights, v, 1) for k, v in stacks.items()}
    assert_close(distmerge.soup(MODELS, weight=weights, normalize=False), summed, 1e-4)


def test_task_averages_the_task_vectors():
    mean = {k: np.mean(d, 0) for k, d in deltas().items()}
    assert_close(distmerge.task(MODELS), plus_base(mean))
    scaled = {k: 0.4 * v for k, v in mean.items()}
    assert_close(distmerge.task(MODELS, scaling=0.4), plus_base(scaled))
    signs = [1, -1, 1]
    signed = {k: np.mean([s * d for s, d in zip(signs, ds, strict=True)], 0)
              for k, ds in deltas().items()}  # fmt: skip
    assert_close(distmerge.task(MODELS, signs=signs), plus_base(signed))
    moved = [*MODELS[1:3], BASE, MODELS[3]]
    assert_close(distmerge.task(moved, base_index=2), plus_base(mean))
    assert_close(distmerge.task(MODELS, lambda_=0.4), plus_base(scaled))


def trimmed(flat, keep):
    """The `keep` share of largest magnitudes, the rest zero."""
    order = np.argsort(-np.abs(flat), kind="stable")
    kept = np.zeros_like(flat)
    chosen = order[: max(1, int(keep * flat.size))]
    kept[chosen] = flat[chosen]
    return kept


def ties_reference(keep, *, weights=(1, 1, 1), scaling=1.0, whole_model=False):
    found = deltas()
    tasks = []
    for i in range(3):
        flat = {k: found[k][i].ravel() for k in SHAPES}
        if whole_model:
            joined = trimmed(np.concatenate(list(flat.values())), keep)
            ends = np.cumsum([v.size for v in flat.values()])[:-1]
            kept = dict(zip(flat, np.split(joined, ends), strict=True))
        else:
            kept = {k: trimmed(v, keep) for k, v in flat.items()}
        tasks.append({k: v.reshape(SHAPES[k]) * weights[i] for k, v in kept.items()})
    offsets = {}
    for key in SHAPES:
        stack = np.stack([task[key] for task in tasks])
        elected = np.where(stack.sum(0) >= 0, 1.0, -1.0)
        agree = np.sign(stack) == elected
        share = (agree * np.reshape(weights, (3, *[1] * (stack.ndim - 1)))).sum(0)
        offsets[key] = scaling * (stack * agree).sum(0) / np.where(share == 0, 1, share)
    return plus_base(offsets)


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.2, 0.5, 1.0])
def test_ties_trims_each_task_vector(keep):
    assert_close(distmerge.ties(MODELS, k=keep), ties_reference(keep))


def test_ties_with_its_other_words():
    assert_close(distmerge.ties(MODELS), ties_reference(0.1))
    found = distmerge.ties(MODELS, k=0.3, weights=[1, 2, 0.5], scaling=0.7)
    expected = ties_reference(0.3, weights=[1, 2, 0.5], scaling=0.7)
    assert_close(found, expected)
    assert_close(distmerge.ties(MODELS, density=0.3, weight=[1, 2, 0.5], lambda_=0.7), expected)
    whole = ties_reference(0.2, whole_model=True)
    assert_close(distmerge.ties(MODELS, k=0.2, over="model"), whole)
    assert not np.allclose(whole["long"], ties_reference(0.2)["long"])


def test_dare_divides_by_the_kept_share():
    mean = {k: np.mean(d, 0) for k, d in deltas().items()}
    assert_close(distmerge.dare(MODELS, p=0.0), plus_base(mean))
    assert_close(distmerge.dare(MODELS, p=1.0), doubles(BASE))
    for p, scaling in ((0.5, 1.0), (0.9, 0.5)):
        merged = distmerge.dare(MODELS[:2], p=p, scaling=scaling, seed=7)
        offset = (merged["wide"] - BASE["wide"]).double().numpy()
        whole = scaling * deltas()["wide"][0] / (1 - p)
        kept = np.abs(offset) > np.abs(whole) / 2
        np.testing.assert_allclose(offset, np.where(kept, whole, 0), atol=1e-5)
        n = kept.size
        assert abs(kept.mean() - (1 - p)) < 5 * np.sqrt(p * (1 - p) / n)
    many = distmerge.dare(MODELS, weights=[0, 3, 0], p=0.0)
    assert_close(many, plus_base({k: d[1] for k, d in deltas().items()}))


def test_slerp_turns_from_the_first_to_the_second():
    a, b = doubles(MODELS[1]), doubles(model(9))
    for tau, options in ((0.5, {}), (0.25, {"tau": 0.25}), (0.25, {"t": 0.25})):
        expected = {}
        for key in ("wide", "long"):
            cosine = (a[key] * b[key]).sum() / np.linalg.norm(a[key]) / np.linalg.norm(b[key])
            angle = np.arccos(cosine)
            expected[key] = (
                np.sin((1 - tau) * angle) * a[key] + np.sin(tau * angle) * b[key]
            ) / np.sin(angle)
        expected["one"] = None
        found = distmerge.slerp([MODELS[1], model(9)], **options)
        sign = np.sign(a["one"] * b["one"])
        expected["one"] = (1 - tau) * a["one"] + tau * b["one"]
        assert sign != 0
        assert_close(found, expected)


def stock_ratio(vectors):
    """t of the paper, from the mean cosine between task vectors."""
    n = len(vectors)
    units = [v / np.linalg.norm(v) for v in vectors]
    cosine = np.mean([units[i] @ units[j] for i in range(n) for j in range(i)])
    return n * cosine / (1 + (n - 1) * cosine)


def test_stock_interpolates_by_the_angle_between_task_vectors():
    found = deltas()
    ratios = {k: stock_ratio([d.ravel() for d in ds]) for k, ds in found.items()}
    expected = plus_base({k: ratios[k] * np.mean(ds, 0) for k, ds in found.items()})
    assert_close(distmerge.stock(MODELS), expected)
    joined = [np.concatenate([found[k][i].ravel() for k in SHAPES]) for i in range(3)]
    one = stock_ratio(joined)
    expected = plus_base({k: one * np.mean(ds, 0) for k, ds in found.items()})
    assert_close(distmerge.stock(MODELS, over="model"), expected)


def test_fisher_weighs_by_importance():
    fishers = [{k: v.abs() for k, v in model(seed).items()} for seed in (4, 5, 6, 7)]
    for values in fishers:
        values["long"][:10] = 0
    xs, fs = [doubles(m) for m in MODELS], [doubles(f) for f in fishers]
    expected = {}
    for key in SHAPES:
        total = sum(f[key] for f in fs)
        weighted = sum(f[key] * x[key] for f, x in zip(fs, xs, strict=True))
        mean = np.mean([x[key] for x in xs], 0)
        expected[key] = np.where(total < 1e-8, mean, weighted / np.maximum(total, 1e-8))
    assert_close(distmerge.fisher(MODELS, fishers=fishers), expected)
    assert_close(distmerge.fisher(MODELS, fishers=iter(fishers), eps=1e-8), expected)
    plain = {k: np.mean([x[k] for x in xs], 0) for k in SHAPES}
    assert_close(distmerge.fisher(MODELS, fishers=fishers, eps=1e9), plain)


def test_examples_are_what_they_say():
    stacks = {k: np.stack([doubles(m)[k] for m in MODELS]) for k in SHAPES}
    lower = {k: np.sort(v, 0)[1] for k, v in stacks.items()}
    assert_close(distmerge.median(MODELS), lower)
    offsets = {
        k: np.take_along_axis(s := np.stack(d), np.abs(s).argmax(0)[None], 0)[0]
        for k, d in deltas().items()
    }
    assert_close(distmerge.max_magnitude(MODELS), plus_base(offsets))


# Parameters -------------------------------------------------------------------------------------


def test_one_method_under_two_names():
    for name, recipe_name in {
        "soup": "linear",
        "task": "task_arithmetic",
        "dare": "dare_linear",
        "stock": "model_stock",
        "slerp": "slerp",
        "ties": "ties",
    }.items():
        assert getattr(distmerge, name) is distmerge.find_method(recipe_name)


@pytest.mark.parametrize(
    ("call", "options", "words"),
    [
        ("ties", {"k": 1.2}, ["density", "k=1.2"]),
        ("ties", {"k": "much"}, ["density", "k='much'"]),
        ("dare", {"p": 1.5}, ["density", "p=1.5"]),
        ("ties", {"over": "moddel"}, ["over"]),
        ("ties", {"k": 0.2, "density": 0.2}, ["k=", "density="]),
        ("ties", {"weights": [1, 1, 1], "weight": 1.0}, ["weights=", "weight="]),
        ("ties", {"weights": [1, 1, 1, 1]}, ["weights", "4 values", "3 models"]),
        ("soup", {"weights": [1, 1, 1]}, ["weights", "3 values", "4 models"]),
        ("task", {"signs": [1]}, ["signs", "1 values", "3 models"]),
        ("ties", {"density": [0.1, 0.2]}, ["density", "2 values", "3 models"]),
        ("ties", {"wieghts": [1, 1, 1]}, ["wieghts", "weights"]),
        ("dare", {"over": "model"}, ["over", "dare_linear"]),
        ("soup", {"weights": [1, -1, 1, -1]}, ["zero"]),
        ("median", {"k": 0.1}, ["median", "none"]),
        ("fisher", {}, ["fishers", "dataset"]),
        ("fisher", {"fishers": [BASE]}, ["1 fishers", "4 models"]),
        ("fisher", {"fishers": MODELS, "dataset": ["text"]}, ["fishers", "dataset"]),
        ("fisher", {"dataset": ["text"]}, ["pipelines"]),
    ],
)
def test_parameters_that_make_no_sense(call, options, words):
    with pytest.raises(ParameterError) as caught:
        getattr(distmerge, call)(MODELS, **options)
    for word in words:
        assert word in str(caught.value)


def test_models_too_few_or_too_many():
    with pytest.raises(RecipeError, match="slerp"):
        distmerge.slerp(MODELS[:3], tau=0.5)
    with pytest.raises(RecipeError, match="ties"):
        distmerge.ties(MODELS, base_index=None)
    with pytest.raises(RecipeError, match="model_stock"):
        distmerge.stock(MODELS[:2])
    with pytest.raises(ParameterError, match="t "):
        distmerge.slerp(MODELS[:2], tau=1.5)
    with pytest.raises(MismatchError):
        distmerge.soup([BASE, {"wide": BASE["wide"]}])


def test_nothing_is_opened_for_parameters_that_make_no_sense():
    with pytest.raises(ParameterError, match="densty"):
        distmerge.ties(["./no/such/base", "./no/such/model"], densty=0.1)


# Fisher from data -------------------------------------------------------------------------------

TEXTS = ["the cat sat on the mat", "a dog ran", "the dog and the cat slept"]


def test_fisher_estimates_from_pipelines_and_data(tmp_path):
    base = small_models.gpt2(0)
    models = [base, small_models.gpt2(1, near=base)]
    names = [small_models.save(m, tmp_path / str(i)) for i, m in enumerate(models)]
    pipes = [transformers.pipeline("text-generation", name, device="cpu") for name in names]
    fishers = [estimate_fisher(pipe, TEXTS) for pipe in pipes]
    xs = [small_models.weights(m) for m in models]
    expected = {
        k: torch.where(
            fishers[0][k] + fishers[1][k] < 1e-8,
            (xs[0][k] + xs[1][k]) / 2,
            (xs[0][k] * fishers[0][k] + xs[1][k] * fishers[1][k])
            / (fishers[0][k] + fishers[1][k]).clamp(min=1e-8),
        )
        for k in xs[0]
    }
    task = "text-generation"
    merged = distmerge.fisher(names, task=task, pipelines=pipes, dataset=TEXTS, framework="pt")
    assert isinstance(merged, transformers.TextGenerationPipeline)
    others = [
        dict(merged.model.named_parameters()),
        dict(distmerge.fisher(names, dataset=iter(TEXTS)).model.named_parameters()),
        dict(distmerge.fisher(pipes, dataset=TEXTS).model.named_parameters()),
        distmerge.fisher(xs, pipelines=pipes, dataset=TEXTS),
        distmerge.fisher(xs, pipelines=names, dataset=TEXTS),
        distmerge.fisher(xs, fishers=fishers),
    ]
    places = [save_importance(f, tmp_path / f"importance{i}") for i, f in enumerate(fishers)]
    others.append(distmerge.fisher(xs, fishers=places))
    others.append(distmerge.fisher([distmerge.open(n) for n in names], fishers=places).collect())
    for found in others:
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert torch.allclose(found[key].detach(), value, atol=1e-6), key
    with pytest.raises(ParameterError, match="1 pipelines for 2"):
        distmerge.fisher(names, pipelines=pipes[:1], dataset=TEXTS)
    assert callable(distmerge.fisher)
