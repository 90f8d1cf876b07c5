"""State dicts that wait: structure from headers alone, values against plain torch."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import small_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distmerge.checkpoints.opening import open_checkpoint
from distmerge.errors import (
    CheckpointNotFound,
    DistmergeError,
    KeyMismatch,
    ParameterError,
    RecipeError,
    ShapeMismatch,
)
from distmerge.expressions.lazy import LazyStateDict, as_lazy, open_lazy
from distmerge.expressions.nodes import LARGEST_EXPRESSION, Binary, Leaf, TensorLeaf, leaves
from distmerge.expressions.settings import Settings, join_settings
from distmerge.expressions.state_dict import StateDict

WIDE = 63
"""Odd, so that rows and blocks don't meet."""


def made(seed, dtype=torch.float32):
    """Tensors of several blocks, one element, and none."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"b.weight": (9000, WIDE), "a.bias": (WIDE,), "scale": (), "none": (0, 3)}
    return {k: torch.randn(shape, generator=draw).to(dtype) for k, shape in shapes.items()}


def saved(tensors, folder, config=None):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {}))
    return str(folder)


@pytest.fixture
def models(tmp_path):
    """(name, tensors) of a base and two others."""
    found = {name: made(seed) for seed, name in enumerate(["base", "legal", "recipes"])}
    return {name: (saved(t, tmp_path / name), t) for name, t in found.items()}


@pytest.fixture
def opened(models):
    return {name: open_lazy(path) for name, (path, _) in models.items()}


@pytest.fixture
def plain(models):
    return {name: tensors for name, (_, tensors) in models.items()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


# Structure --------------------------------------------------------------------------------------


def test_formulas_print_as_they_were_written(opened):
    base, legal = opened["base"], opened["legal"]
    assert str(base.expression) == "base"
    merged = base + 0.5 * (legal - base)
    assert str(merged.expression) == "(base + (0.5 * (legal - base)))"
    assert repr(merged) == "<LazyStateDict: (base + (0.5 * (legal - base)))>"
    assert str((1 - base / 3).expression) == "(1 - (base / 3))"
    assert str((-base).expression) == "(base * -1)"
    assert str(sum([base, legal]).expression) == "(base + legal)"
    merged += legal
    assert str(merged.expression) == "((base + (0.5 * (legal - base))) + legal)"


def test_keys_come_from_headers_alone(opened, models):
    merged = opened["base"] + 0.5 * (opened["legal"] - opened["base"])
    for path, _ in models.values():
        shutil.rmtree(path)
    assert list(merged) == file_order(merged)
    assert len(merged) == 4
    assert "a.bias" in merged
    assert "bias" not in merged
    assert "legal" in merged.explain()
    with pytest.raises(DistmergeError):
        merged.collect()


def file_order(merged):
    """Keys in the order of the base's file, as safetensors' own writer put them."""
    leaf = leaves(merged.expression)[0]
    return sorted(leaf.checkpoint.tensors, key=lambda key: leaf.checkpoint.tensors[key].start)


def test_explain_names_every_model_once(opened, models):
    lines = (opened["base"] + 0.5 * (opened["legal"] - opened["base"])).explain().splitlines()
    assert lines[0] == "(base + (0.5 * (legal - base)))"
    nbytes = sum(t.numel() * 4 for t in models["base"][1].values())
    assert lines[1] == f"  base: 4 tensors, {nbytes / 1e6:,.1f} MB, {models['base'][0]}"
    assert models["legal"][0] in lines[2]
    assert len(lines) == 3


def test_explain_says_how_names_were_matched(tmp_path):
    base = small_models.gpt2(0)
    inner = saved(small_models.weights(base.transformer), tmp_path / "inner", {"model_type": "x"})
    outer = small_models.save(small_models.gpt2(1, near=base), tmp_path / "outer")
    both = open_lazy(inner) + open_lazy(outer)
    assert "transformer.X -> X" in both.explain()
    assert all(not key.startswith("transformer.") for key in both)
    assert all(key.startswith("transformer.") for key in open_lazy(outer) + open_lazy(inner))
    expected = base.transformer.wte.weight + small_models.gpt2(1, near=base).transformer.wte.weight
    assert torch.equal(both["wte.weight"], expected)


def test_equal_expressions_are_equal_and_nothing_is_computed(opened, models):
    base = opened["base"]
    again = open_lazy(models["base"][0])
    shutil.rmtree(models["base"][0])
    assert base == again
    assert hash(base + 1) == hash(again + 1)
    assert base + 1 != base + 2
    assert base != dict.fromkeys(base)
    assert base.copy() == base
    assert base.copy() is not base


def test_it_travels(opened):
    merged = opened["base"] * 2
    assert pickle.loads(pickle.dumps(merged)) == merged


def test_what_does_not_exist(tmp_path, opened):
    with pytest.raises(CheckpointNotFound):
        open_lazy(tmp_path / "nothing")
    with pytest.raises(KeyMismatch, match=r"a\.bias"):
        opened["base"]["a.bais"]
    with pytest.raises(KeyError):
        opened["base"].collect(["a.bias", "zzz"])
    with pytest.raises(KeyMismatch, match="zzz"):
        opened["base"].subset(["zzz"])
    assert opened["base"].get("zzz") is None


# Operands ---------------------------------------------------------------------------------------


def test_dicts_modules_and_numbers_join_in(opened, plain):
    base, tensors = opened["base"], plain["base"]
    others = dict(plain["legal"])
    for merged, expected in (
        (base - others, {k: tensors[k] - others[k] for k in tensors}),
        (others - base, {k: others[k] - tensors[k] for k in tensors}),
        (StateDict(others) * base, {k: others[k] * tensors[k] for k in tensors}),
        (base / StateDict(others), {k: tensors[k] / others[k] for k in tensors}),
        (StateDict(others).add(base), {k: others[k] + tensors[k] for k in tensors}),
        (torch.tensor(0.3) * base, {k: 0.3 * tensors[k] for k in tensors}),
        (base / torch.tensor(3.0).numpy(), {k: tensors[k] / 3.0 for k in tensors}),
        (1 - base, {k: 1 - tensors[k] for k in tensors}),
    ):
        assert isinstance(merged, LazyStateDict)
        assert_same({key: merged.collect()[key] for key in merged}, {**expected})


def test_a_state_dict_becomes_lazy_when_a_lazy_one_is_added(opened, plain):
    sd = StateDict(plain["legal"])
    kept = sd
    sd += opened["base"]
    assert isinstance(sd, LazyStateDict)
    assert_same(kept, plain["legal"])


def test_what_a_dict_held_when_it_joined_counts(opened, plain):
    sd = StateDict(plain["legal"])
    merged = opened["base"] + sd
    sd *= 0
    sd.clear()
    assert_same(merged.collect(), {k: v + plain["legal"][k] for k, v in plain["base"].items()})


def test_a_module_joins_by_its_parameter_names(tmp_path):
    base, tuned = small_models.gpt2(0), small_models.gpt2(1)
    lazy = open_lazy(small_models.save(base, tmp_path / "base"))
    merged = lazy - tuned
    assert "GPT2LMHeadModel" in str(merged.expression)
    a, b = small_models.weights(base), small_models.weights(tuned)
    assert_same(merged.collect(), {key: a[key] - b[key] for key in a})


@pytest.mark.parametrize("shape", [(WIDE,), (1,), (2, 2)], ids=str)
def test_tensors_that_would_broadcast_are_refused(opened, shape):
    for attempt in (
        lambda: opened["base"] * torch.ones(shape),
        lambda: torch.ones(shape) - opened["base"],
        lambda: torch.ones(shape).numpy() - opened["base"],
        lambda: opened["base"].div(torch.ones(shape)),
    ):
        with pytest.raises(RecipeError, match="collect"):
            attempt()


def test_other_operands_are_type_errors(opened):
    for nonsense in ("base", None, [1.0], 1j):
        with pytest.raises(TypeError):
            opened["base"] + nonsense
        with pytest.raises(TypeError):
            nonsense * opened["base"]
    with pytest.raises(ParameterError, match="average"):
        opened["base"].add(opened["legal"], on_missing="average")


def test_keys_and_shapes_that_disagree_show_before_anything_is_read(tmp_path, opened, plain):
    less = {k: v for k, v in plain["legal"].items() if k != "a.bias"}
    legal = open_lazy(saved(less, tmp_path / "less"))
    with pytest.raises(KeyMismatch, match=r"a\.bias"):
        list(opened["base"] + legal)
    common = opened["base"].add(legal, on_missing="common")
    assert set(common) == set(less)
    assert_same(common.collect(), {k: plain["base"][k] + less[k] for k in less})
    other = open_lazy(saved({**plain["legal"], "a.bias": torch.ones(3)}, tmp_path / "other"))
    with pytest.raises(ShapeMismatch, match=r"a\.bias"):
        len(opened["base"] + other)


# Values -----------------------------------------------------------------------------------------


def test_it_computes_what_torch_computes(opened, plain):
    base, legal, recipes = (opened[name] for name in ("base", "legal", "recipes"))
    merged = base + 0.5 * ((legal - base) + (recipes - base)) / 2
    a, b, c = (plain[name] for name in ("base", "legal", "recipes"))
    expected = {k: a[k] + 0.5 * ((b[k] - a[k]) + (c[k] - a[k])) / 2 for k in a}
    collected = merged.collect()
    assert isinstance(collected, StateDict)
    assert list(collected) == list(merged)
    assert_same(collected, expected)
    for key in merged:
        assert torch.equal(merged[key], expected[key])
    some = merged.collect(["scale", "a.bias"])
    assert list(some) == ["scale", "a.bias"]
    assert torch.equal(some["a.bias"], expected["a.bias"])


def test_16_bit_models_are_merged_in_float32_and_rounded_once(tmp_path):
    a, b = made(0, torch.bfloat16), made(1, torch.bfloat16)
    base, legal = (open_lazy(saved(t, tmp_path / n)) for t, n in ((a, "base"), (b, "legal")))
    found = (base + 0.1 * (legal - base)).collect()
    wide = {k: a[k].float() + 0.1 * (b[k].float() - a[k].float()) for k in a}
    assert_same(found, {k: v.to(torch.bfloat16) for k, v in wide.items()})


def test_subset_keeps_the_expressions_order_and_goes_on_calculating(opened, plain):
    base, legal = opened["base"], opened["legal"]
    wanted = ["scale", "a.bias"]
    part = (legal - base).subset(wanted)
    order = [key for key in base if key in wanted]
    assert list(part) == order
    scaled = base.subset(wanted) + 2 * part
    expected = {k: plain["base"][k] + 2 * (plain["legal"][k] - plain["base"][k]) for k in wanted}
    assert_same(scaled.collect(), expected)
    with pytest.raises(KeyMismatch, match=r"b\.weight"):
        list(base + part)
    assert set(base.add(part, on_missing="common")) == set(wanted)
    assert "2 keys" in str(part.expression)


def test_subset_leaves_integers_out_too():
    lazy = as_lazy({"w": torch.ones(2), "steps": torch.tensor(3), "mask": torch.tensor(True)})
    assert list(lazy.subset(["w", "mask"]).collect()) == ["w", "mask"]
    assert lazy["steps"].dtype == torch.int64


def test_only_the_wanted_keys_are_computed_in_memory():
    lazy = as_lazy({"a": torch.ones(2), "b": torch.zeros(2)}) / {
        "a": torch.ones(2),
        "b": torch.zeros(2),
    }
    assert torch.equal(lazy["a"], torch.ones(2))
    assert torch.isnan(lazy["b"]).all()


def test_memory_is_never_shared_with_the_inputs():
    tensors = {"a": torch.ones(2)}
    found = as_lazy(tensors).collect()
    found["a"].zero_()
    assert torch.equal(tensors["a"], torch.ones(2))


def test_save_writes_what_was_computed_and_opens_it(opened, plain, tmp_path):
    merged = opened["base"] + 0.5 * (opened["legal"] - opened["base"])
    written = merged.save(tmp_path / "merged", overwrite=False)
    assert isinstance(written, LazyStateDict)
    assert str(tmp_path / "merged") in written.explain()
    expected = {k: v + 0.5 * (plain["legal"][k] - v) for k, v in plain["base"].items()}
    assert_same(load_file(tmp_path / "merged" / "model.safetensors"), expected)
    assert_same(written.collect(), expected)
    assert list(written) == list(merged)
    twice = (written - merged).collect()
    assert all(float(value.abs().sum()) == 0 for value in twice.values())


# Settings ---------------------------------------------------------------------------------------


def checkpoint_at(root, models):
    """A real catalogue under another address."""
    return Leaf(replace(open_checkpoint(models["base"][0]), root=root, url=root), root)


def test_storage_options_join(models):
    here = open_lazy(models["base"][0]).expression
    a, b = checkpoint_at("s3://a/m", models), checkpoint_at("s3://b/m", models)
    hub = checkpoint_at("hf://org/m", models)
    secret, other = {"key": "k", "secret": "hush"}, {"key": "x"}

    def joined(*parts):
        return join_settings([(e, Settings(storage_options=o)) for e, o in parts]).storage_options

    assert joined((a, secret), (here, {}), (hub, {})) == secret
    assert joined((here, {}), (a, secret), (b, secret)) == secret
    assert joined((a, secret), (b, {})) == {"s3://a/m": secret, "s3://b/m": {}}
    assert joined((a, secret), (b, other)) == {"s3://a/m": secret, "s3://b/m": other}
    assert joined((a, {"s3://a/": secret}), (b, other)) == {"s3://a/": secret, "s3://b/m": other}
    assert joined((here, {}), (hub, {})) == {}
    with pytest.raises(RecipeError) as caught:
        joined((a, secret), (a, other))
    assert "hush" not in str(caught.value)
    assert "s3://a/m" in str(caught.value)
    assert "hush" not in repr(Settings(storage_options=secret))
    assert "hush" not in repr(LazyStateDict(a, storage_options=secret))


def test_storage_options_for_the_output(models):
    a, secret, other = checkpoint_at("s3://a/m", models), {"key": "k"}, {"key": "x"}
    plain, by_place = Settings(storage_options=secret), Settings(storage_options={"s3://a": secret})
    assert plain.options_with(a, "s3://out", {}) == secret
    assert plain.options_with(a, "s3://out", {"endpoint_url": "u"}) == {
        "key": "k",
        "endpoint_url": "u",
    }
    assert by_place.options_with(a, "s3://out", other) == {"s3://a": secret, "s3://out": other}
    assert plain.options_with(a, "s3://out", {"s3://out": other}) == {
        "s3://a/m": secret,
        "s3://out": other,
    }


def test_seeds_and_donors_join(opened):
    expression = opened["base"].expression
    settings = join_settings([(expression, Settings()), (expression, Settings(seed=3))])
    assert settings.seed == 3
    assert join_settings([(expression, Settings())], seed=4).seed == 4
    with pytest.raises(ParameterError, match="3 and 4"):
        join_settings([(expression, Settings(seed=3))], seed=4)
    seeded = LazyStateDict(expression, seed=5, donor=expression) + opened["legal"]
    assert (seeded.request().seed, seeded.request().donor) == (5, expression)
    reversed_ = opened["legal"] - seeded
    assert reversed_.request().donor == expression
    assert (opened["legal"] + 1).request().donor == opened["legal"].expression
    assert as_lazy({"a": torch.ones(1)}).request().donor is None


def test_as_lazy_takes_models_of_every_kind(opened):
    assert as_lazy(opened["base"]) is opened["base"]
    assert isinstance(as_lazy(nn.Linear(2, 2)).expression, TensorLeaf)
    assert as_lazy("base") is None
    assert as_lazy(3) is None
    assert isinstance((as_lazy({"a": torch.ones(1)}) + 1).expression, Binary)


def test_an_expression_that_doubles_itself_over_and_over_is_refused():
    doubled = as_lazy({"w": torch.ones(2)})
    while 2 * doubled.expression.size < LARGEST_EXPRESSION:
        doubled = doubled + doubled
    with pytest.raises(RecipeError, match="uses its own parts too often"):
        doubled + doubled
