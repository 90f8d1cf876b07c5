"""Slices, modules and nested documents: each written tensor against the formula, from the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run.family import tensors_at
from safetensors.torch import save_file
from torch import Tensor

import distmerge
from distmerge.errors import KeyMismatch, RecipeError
from distmerge.run.merge import plan

COUNTS = {"base": 6, "a": 6, "b": 6, "long": 9}


def make(folder: Path, seed: int, layers: int, *, prefix: str = "model.", **config: Any) -> None:
    """A model whose files list its keys as transformers does: the head first."""
    random = torch.Generator().manual_seed(seed)
    keys = ["lm_head.weight", f"{prefix}embed_tokens.weight"]
    keys += [f"{prefix}layers.{n}.{part}.weight" for n in range(layers) for part in ("attn", "mlp")]
    keys.append(f"{prefix}norm.weight")
    tensors = {key: torch.randn(3, 4, generator=random) for key in keys}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    kinds = [f"{folder.name}{n}" for n in range(layers)]
    held = {"model_type": "none", "num_hidden_layers": layers, "layer_types": kinds, **config}
    (folder / "config.json").write_text(json.dumps(held))


@pytest.fixture
def models(tmp_path, monkeypatch) -> dict[str, dict[str, Tensor]]:
    monkeypatch.chdir(tmp_path)
    for seed, (name, count) in enumerate(COUNTS.items()):
        make(tmp_path / name, seed, count)
    return {name: tensors_at(tmp_path / name) for name in COUNTS}


def merged(recipe: Any, out: str = "out", **options: Any) -> tuple[dict[str, Tensor], dict]:
    distmerge.merge(recipe, out, **options)
    return tensors_at(out), json.loads(Path(out, "config.json").read_text())


def passed(*slices: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [{"sources": [{"model": m, "layer_range": [a, b]}]} for m, a, b in slices]


def layer(models, name: str, n: int) -> list[Tensor]:
    return [models[name][f"model.layers.{n}.{part}.weight"] for part in ("attn", "mlp")]


def assert_layers(found: dict[str, Tensor], models, origins: list[tuple[str, int]]) -> None:
    for n, (name, own) in enumerate(origins):
        for mine, theirs in zip(
            layer({"out": found}, "out", n), layer(models, name, own), strict=True
        ):
            assert torch.equal(mine, theirs), n
    assert f"model.layers.{len(origins)}.attn.weight" not in found


def test_a_frankenmerge_renumbers_layers_and_keeps_its_config_true(models):
    slices = passed(("a", 0, 4), ("b", 2, 6), ("a", 3, 5), ("long", 8, 9))
    found, config = merged({"merge_method": "passthrough", "slices": slices})
    origins = [
        *(("a", n) for n in range(4)),
        *(("b", n) for n in range(2, 6)),
        ("a", 3),
        ("a", 4),
        ("long", 8),
    ]
    assert_layers(found, models, origins)
    assert torch.equal(found["model.embed_tokens.weight"], models["a"]["model.embed_tokens.weight"])
    for key in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(found[key], models["long"][key])
    assert config["num_hidden_layers"] == 11
    assert config["layer_types"] == [f"{name}{n}" for name, n in origins]


def test_layers_stand_together_in_the_order_of_their_numbers(models):
    slices = passed(("a", 0, 2), ("b", 0, 6), ("a", 2, 6))
    keys = list(plan({"merge_method": "passthrough", "slices": slices}).weight_map)
    numbers = [int(key.split(".")[2]) for key in keys if ".layers." in key]
    assert numbers == sorted(numbers) == [n for n in range(12) for _ in range(2)]


def test_every_unused_tensor_is_listed_once_with_its_reason(models):
    slices = passed(("a", 0, 4), ("b", 3, 6))
    decided = plan({"merge_method": "passthrough", "slices": slices})
    reasons = {(s.model, s.key): s.reason for s in decided.skipped}
    assert len(reasons) == len(decided.skipped)
    expected = {("a", k): "taken from b" for k in ("lm_head.weight", "model.norm.weight")}
    expected |= {("b", "model.embed_tokens.weight"): "taken from a"}
    for name, numbers in (("a", (4, 5)), ("b", (0, 1, 2))):
        for n in numbers:
            for part in ("attn", "mlp"):
                expected[name, f"model.layers.{n}.{part}.weight"] = "outside layer_range"
    assert reasons == expected


def test_a_tensor_that_is_neither_read_nor_listed_fails_the_plan(models, monkeypatch):
    from distmerge.expressions import alignment

    match = alignment.match_names

    def losing(*args: Any, **options: Any) -> Any:
        found = match(*args, **options)
        own = {k: v for k, v in found.own.items() if k != "model.norm.weight"}
        return type(found)(own, found.mappings, found.skipped, found.extra)

    monkeypatch.setattr(alignment, "match_names", losing)
    recipe = {
        "merge_method": "linear",
        "models": ["a", "b"],
        "parameters": {"weight": 1},
        "on_missing": "average",
    }
    with pytest.raises(KeyMismatch, match="1 tensors would be lost") as raised:
        plan(recipe)
    assert "model.norm.weight of b" in raised.value.facts


def test_the_nearest_of_four_levels_counts(models):
    """The source's own, then its slice's, its module's, the recipe's."""
    recipe = {
        "merge_method": "linear",
        "parameters": {"weight": 5.0, "normalize": False},
        "modules": {
            "default": {
                "parameters": {"weight": [{"filter": "attn", "value": 3.0}]},
                "slices": [
                    {
                        "sources": [
                            {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 1.0}},
                            {"model": "b", "layer_range": [0, 2]},
                        ],
                        "parameters": {"weight": [{"filter": "layers.0.attn", "value": 2.0}]},
                    },
                ],
            }
        },
    }
    found, _ = merged(recipe)
    for n, others in enumerate([(2.0, 5.0), (3.0, 5.0)]):
        parts = zip(layer(models, "a", n), layer(models, "b", n), others, strict=True)
        for mine, (first, second, weight) in zip(
            layer({"out": found}, "out", n), parts, strict=True
        ):
            assert torch.allclose(mine, first + weight * second, atol=1e-5)


def test_slices_merge_with_parameters_of_three_levels(models):
    recipe = {
        "merge_method": "linear",
        "parameters": {"weight": 4.0, "normalize": False},
        "slices": [
            {
                "sources": [
                    {"model": "a", "layer_range": [0, 3], "parameters": {"weight": [1, 3]}},
                    {"model": "b", "layer_range": [3, 6]},
                ],
                "parameters": {"weight": [{"filter": "mlp", "value": 2}]},
            },
            {
                "sources": [
                    {"model": "a", "layer_range": [3, 6]},
                    {"model": "long", "layer_range": [6, 9], "parameters": {"weight": 0.5}},
                ],
                "parameters": {"normalize": True},
            },
        ],
    }
    found, config = merged(recipe)
    for n in range(3):
        own = 1.0 + n  # a gradient over the slice's three layers
        for i, other in enumerate((4.0, 2.0)):
            expected = own * layer(models, "a", n)[i] + other * layer(models, "b", n + 3)[i]
            assert torch.allclose(layer({"out": found}, "out", n)[i], expected, atol=1e-5)
    for n in range(3, 6):
        for i in range(2):
            expected = 4 * layer(models, "a", n)[i] + 0.5 * layer(models, "long", n + 3)[i]
            assert torch.allclose(layer({"out": found}, "out", n)[i], expected / 4.5, atol=1e-5)
    embed = [models[name]["model.embed_tokens.weight"] for name in "ab"]
    assert torch.allclose(found["model.embed_tokens.weight"], embed[0] + 4 * embed[1], atol=1e-5)
    head = [models[name]["lm_head.weight"] for name in ("a", "long")]
    assert torch.allclose(found["lm_head.weight"], (4 * head[0] + 0.5 * head[1]) / 4.5, atol=1e-5)
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == [f"a{n}" for n in range(6)]


def test_filters_see_the_names_that_a_model_has_for_its_layers(models):
    """As in mergekit, for what each model has a value of its own of."""
    weight = [{"filter": "layers.3.", "value": 5}, {"filter": "layers.0.", "value": 7}]
    sources = [{"model": "a", "layer_range": [3, 5]}, {"model": "b", "layer_range": [0, 2]}]
    keys = {"merge_method": "linear", "slices": [{"sources": sources}]}
    parameters = {"weight": [*weight, {"value": 1}], "normalize": False}
    found, _ = merged({**keys, "parameters": parameters})
    for n, (first, second) in enumerate([(5, 7), (1, 1)]):
        for i, own in enumerate(layer({"out": found}, "out", n)):
            expected = first * layer(models, "a", n + 3)[i] + second * layer(models, "b", n)[i]
            torch.testing.assert_close(own, expected)


def test_a_slice_of_all_layers_is_the_same_merge_as_models(models):
    sources = [{"model": name, "layer_range": [0, 6]} for name in ("base", "a")]
    keys = {"merge_method": "slerp", "base_model": "base", "parameters": {"t": [0, 0.5, 1]}}
    sliced = plan({**keys, "slices": [{"sources": sources}]})
    whole = plan({**keys, "models": ["base", "a"]})
    assert sliced.digest == whole.digest
    assert sliced.skipped == ()


@pytest.mark.parametrize("listed", [True, False])
def test_a_base_inside_slices_is_taken_layer_by_layer(models, listed):
    weight = {"parameters": {"weight": 0.5}}
    sources = [{"model": name, "layer_range": [2, 5], **weight} for name in "ab"]
    base = [{"model": "long", "layer_range": [4, 7]}] if listed else []
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "long",
        "slices": [{"sources": [*base, *sources]}],
    }
    found, config = merged(recipe)
    first = 4 if listed else 2
    for n in range(3):
        for i in range(2):
            start = layer(models, "long", first + n)[i]
            deltas = [layer(models, name, 2 + n)[i] - start for name in "ab"]
            expected = start + 0.5 * deltas[0] + 0.5 * deltas[1]
            assert torch.allclose(layer({"out": found}, "out", n)[i], expected, atol=1e-5)
    assert config["layer_types"] == [f"long{first + n}" for n in range(3)]


def test_each_slice_may_have_a_base_of_its_own(models):
    one = {"model": "a", "layer_range": [0, 3]}
    two = {"model": "a", "layer_range": [3, 6]}
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "parameters": {"weight": 1.0},
        "slices": [{"sources": [one], "base_model": "b"}, {"sources": [two]}],
    }
    shown = str(plan(recipe).request.root)
    assert shown.startswith("stack(task_arithmetic(a[0:3], base=b[0:3]")
    assert "task_arithmetic(a[3:6], base=base[3:6]" in shown


def test_one_model_may_be_merged_with_its_own_layers(models):
    sources = [{"model": "a", "layer_range": span} for span in ([0, 2], [2, 4])]
    recipe = {
        "merge_method": "linear",
        "parameters": {"weight": 0.5},
        "slices": [{"sources": sources}],
    }
    found, _ = merged(recipe)
    for n in range(2):
        mean = [
            (x + y) / 2
            for x, y in zip(layer(models, "a", n), layer(models, "a", n + 2), strict=True)
        ]
        assert torch.allclose(layer({"out": found}, "out", n)[0], mean[0])
    assert torch.equal(found["lm_head.weight"], models["a"]["lm_head.weight"])


def test_other_spellings_are_matched_before_layers_are_moved(models, tmp_path):
    make(tmp_path / "bare", 9, 6, prefix="")
    bare = tensors_at("bare")
    found, config = merged(
        {"merge_method": "passthrough", "slices": passed(("a", 0, 2), ("bare", 1, 6))}
    )
    for n in range(5):
        assert torch.equal(
            found[f"model.layers.{n + 2}.mlp.weight"], bare[f"layers.{n + 1}.mlp.weight"]
        )
    assert config["layer_types"][2] == "bare1"


def test_random_draws_and_bytes_do_not_depend_on_how_it_runs(models):
    recipe = {
        "merge_method": "dare_ties",
        "base_model": "base",
        "parameters": {"weight": 1.0, "density": 0.5},
        "slices": [
            {"sources": [{"model": m, "layer_range": [n, n + 3]} for m in "ab"]} for n in (0, 3)
        ],
    }
    one, _ = merged(recipe, "one", workers=1)
    two, _ = merged(recipe, "two", workers=2, max_shard_size=300)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("changes", "headline", "fix"),
    [
        ({"slices": passed(("a", 0, 7))}, "a has no layers 0 to 7", "[0, 6]"),
        ({"slices": passed(("a", 3, 3))}, "a layer_range takes no layers", "[FIRST, LAST + 1]"),
        ({"slices": passed(("a", -1, 3))}, "a layer_range takes no layers", "[FIRST"),
        ({"slices": [{}]}, "slices.0.sources: it is missing", "sources: [{"),
        (
            {"slices": [{"sources": [{"model": "a", "layer_range": [1]}]}]},
            "layer_range.1: it is missing",
            "layer_range: [0, 16]",
        ),
        ({"slices": passed(("a", 0, 3)), "models": ["b"]}, "there are models and slices", "keep"),
        (
            {
                "slices": [
                    {
                        "sources": [
                            {"model": "a", "layer_range": [0, 2]},
                            {"model": "b", "layer_range": [0, 3]},
                        ]
                    }
                ],
                "merge_method": "linear",
                "parameters": {"weight": 1},
            },
            "the sources of a slice have different numbers of layers",
            "equal length",
        ),
        (
            {
                "slices": [
                    {
                        "sources": [
                            {"model": "a", "layer_range": [0, 2]},
                            {"model": "b", "layer_range": [1, 3]},
                        ]
                    }
                ],
                "merge_method": "ties",
                "base_model": "base",
                "parameters": {"weight": 1},
            },
            "which layers of base are the base of this slice?",
            "add the base to 'sources:'",
        ),
        (
            {"slices": [{"sources": ["a", "b"]}], "merge_method": "passthrough"},
            "passthrough merges 1 model, not 2.",
            "list 1",
        ),
    ],
)
def test_slices_that_make_no_sense(models, changes, headline, fix):
    with pytest.raises(RecipeError) as raised:
        plan({"merge_method": "passthrough", **changes})
    assert headline in raised.value.headline
    assert fix in (raised.value.fix or "")


def test_models_without_numbered_layers_cannot_be_sliced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("flat").mkdir()
    save_file({"w": torch.ones(2)}, "flat/model.safetensors")
    with pytest.raises(RecipeError, match="no numbered layers"):
        plan({"merge_method": "passthrough", "slices": passed(("flat", 0, 1), ("flat", 0, 1))})


def test_nested_documents_are_merged_where_they_are_used(models):
    text = """\
name: blend
merge_method: linear
models:
  - {model: a, parameters: {weight: [0, 1]}}
  - {model: b, parameters: {weight: 1}}
parameters: {normalize: false}
---
merge_method: passthrough
slices:
  - sources: [{model: base, layer_range: [0, 2]}]
  - sources: [{model: blend, layer_range: [2, 5]}]
"""
    found, config = merged(text)
    assert not Path("blend").exists()
    assert_layers(
        {k: v for k, v in found.items() if ".layers.0." in k or ".layers.1." in k},
        models,
        [("base", 0), ("base", 1)],
    )
    for n in range(2, 5):  # the gradient runs over all six layers of the nested merge
        for i in range(2):
            expected = n / 5 * layer(models, "a", n)[i] + layer(models, "b", n)[i]
            assert torch.allclose(layer({"out": found}, "out", n)[i], expected, atol=1e-6)
    assert torch.allclose(found["lm_head.weight"], models["b"]["lm_head.weight"], atol=1e-6)
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == ["base0", "base1", "a2", "a3", "a4"]
