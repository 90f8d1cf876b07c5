"""`explain`: against values computed by hand, from recipes whose levels all differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.commands import call
from safetensors.torch import save_file

from distmerge.errors import KeyMismatch
from distmerge.plan.explain import to_json
from distmerge.plan.explain_text import grouped, row
from distmerge.run.merge import plan

LAYERS = 5
SHAPES = {
    "model.embed_tokens.weight": (6, 4),
    **{
        f"model.layers.{n}.{module}.weight": (4, 4)
        for n in range(LAYERS)
        for module in ("mlp.up_proj", "self_attn.q_proj")
    },
    "model.norm.weight": (4,),
}
TIES = {
    "normalize": True,
    "rescale": False,
    "lambda": 1.0,
    "over": "tensor",
    "sign_weighting": "weighted",
}


def write(folder: Path, seed: int, **changes: Any) -> None:
    random = torch.Generator().manual_seed(seed)
    tensors = {k: torch.randn(s, generator=random).bfloat16() for k, s in SHAPES.items()}
    folder.mkdir()
    save_file({**tensors, **changes}, folder / "model.safetensors")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, seed)
    return tmp_path


def explained(recipe: Any, pattern: str | None = None, **options: Any) -> dict[str, Any]:
    return to_json(plan(recipe, **options), pattern)


def given(tensor: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By model, what a method above gives to it."""
    return {one["model"]: one.get("given", {}) for one in tensor["from"]["of"]}


FOUR_LEVELS = {
    "merge_method": "ties",
    "base_model": "base",
    "modules": {
        "default": {
            "slices": [
                {
                    "sources": [
                        {
                            "model": "a",
                            "layer_range": [0, 3],
                            "parameters": {"weight": {"filter": "mlp", "value": [0.0, 1.0]}},
                        },
                        {"model": "b", "layer_range": [0, 3]},
                    ],
                    "parameters": {"density": [0.2, 0.6]},
                },
                {
                    "sources": [
                        {"model": "a", "layer_range": [1, 3], "parameters": {"density": [0.9]}},
                        {"model": "base", "layer_range": [1, 3]},
                    ]
                },
            ],
            "parameters": {"weight": {"filter": "self_attn", "value": 0.5}, "normalize": False},
        }
    },
    "parameters": {"weight": 0.25, "density": 0.7, "normalize": True, "lambda": 2},
}


def test_four_levels_filters_gradients_and_slices_as_computed_by_hand(here):
    found = explained(FOUR_LEVELS)
    tensors = found["tensors"]
    assert list(tensors) == [
        *sorted(key for key in tensors if key.startswith("model.embed")),
        *(
            f"model.layers.{n}.{m}.weight"
            for n in range(5)
            for m in ("mlp.up_proj", "self_attn.q_proj")
        ),
        "model.norm.weight",
    ]
    for tensor in tensors.values():
        assert tensor["from"]["method"] == "ties"
        assert tensor["from"]["parameters"] == {**TIES, "normalize": False, "lambda": 2.0}
        assert (tensor["dtype"], tensor["shard"]) == ("BF16", "model.safetensors")
    # The first slice: a gradient over three layers is at 0, 1/2 and 1.
    for n, (mlp, density) in enumerate([(0.0, 0.2), (0.5, 0.4), (1.0, 0.6)]):
        up = given(tensors[f"model.layers.{n}.mlp.up_proj.weight"])
        assert up["a"] == pytest.approx({"weight": mlp, "density": density})
        assert up["b"] == pytest.approx({"weight": 0.25, "density": density})
        query = given(tensors[f"model.layers.{n}.self_attn.q_proj.weight"])
        assert query["a"] == query["b"] == pytest.approx({"weight": 0.5, "density": density})
    # The second: other layers of a, of the base too; b is in none of them.
    for n, own in [(3, 1), (4, 2)]:
        tensor = tensors[f"model.layers.{n}.mlp.up_proj.weight"]
        assert given(tensor) == {"base": {}, "a": {"weight": 0.25, "density": 0.9}}
        assert [one["key"] for one in tensor["from"]["of"]] == 2 * [
            f"model.layers.{own}.mlp.up_proj.weight"
        ]
        assert tensor["from"]["of"][0]["role"] == "base"
    # Before the layers the first slice counts, at its gradients' first value; after them the last.
    assert given(tensors["model.embed_tokens.weight"])["a"] == {"weight": 0.25, "density": 0.2}
    assert given(tensors["model.norm.weight"]) == {
        "base": {},
        "a": {"weight": 0.25, "density": 0.9},
    }


def test_what_is_left_out_is_there_with_its_reason(here):
    found = explained(FOUR_LEVELS)["skipped"]
    reasons = {(one["model"], one["key"]): one["reason"] for one in found}
    expected = {("b", "model.norm.weight"): "taken from base, a"}
    for model in ("base", "a", "b"):
        for n in (3, 4):
            for module in ("mlp.up_proj", "self_attn.q_proj"):
                key = f"model.layers.{n}.{module}.weight"
                expected[model, key] = "outside layer_range"
    assert reasons == expected
    alone = explained(FOUR_LEVELS, "model.norm.*")
    assert list(alone["tensors"]) == ["model.norm.weight"]
    assert alone["skipped"] == [
        {"model": "b", "key": "model.norm.weight", "reason": "taken from base, a"}
    ]


def test_equal_layers_stand_together_and_unequal_ones_apart(here):
    recipe = {
        "merge_method": "linear",
        "models": ["a", "b"],
        "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 0.25}]},
        "dtype": "float32",
    }
    from distmerge.plan.explain import explain

    groups = grouped(explain(plan(recipe))[0])
    assert [row(group)[:2] for group in groups] == [
        (
            "model.embed_tokens.weight\n"
            "model.layers.{0..4}.self_attn.q_proj.weight\n"
            "model.norm.weight",
            "F32",
        ),
        ("model.layers.{0..4}.mlp.up_proj.weight", "F32"),
    ]
    assert [row(group)[2].splitlines()[1] for group in groups] == [
        "  a  weight=0.25  model.safetensors",
        "  a  weight=0.5  model.safetensors",
    ]
    moved = [[1, 3], [0, 2], [4, 5]]
    stack = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "a", "layer_range": one}]} for one in moved],
    }
    rows = [row(group) for group in grouped(explain(plan(stack), "*mlp*")[0])]
    assert [(keys, tree.split("  ")[3]) for keys, _, tree in rows] == [
        ("model.layers.{0..1}.mlp.up_proj.weight", "layer {1..2}"),
        ("model.layers.{2..3}.mlp.up_proj.weight", "layer {0..1}"),
        ("model.layers.4.mlp.up_proj.weight", "model.safetensors"),
    ]


def test_nested_documents_are_a_tree_for_each_tensor(here):
    one = {
        "name": "mixed",
        "merge_method": "linear",
        "models": [{"model": "a", "parameters": {"weight": [0.0, 0.4]}}, "b"],
        "parameters": {"weight": 0.6},
    }
    final = {
        "merge_method": "slerp",
        "base_model": "base",
        "models": ["mixed"],
        "parameters": {"t": 0.3},
        "out_dtype": "float16",
    }
    found = explained([one, final], "model.layers.3.mlp*")["tensors"]
    (tensor,) = found.values()
    assert tensor["dtype"] == "F16"
    tree = tensor["from"]
    assert (tree["method"], tree["parameters"]["t"]) == ("slerp", 0.3)
    base, mixed = tree["of"]
    assert (base["model"], base["role"]) == ("base", "base")
    assert (mixed["method"], mixed["parameters"]) == ("linear", {"normalize": True})
    weights = [(leaf["model"], leaf["given"]["weight"]) for leaf in mixed["of"]]
    assert weights == [("a", pytest.approx(0.3)), ("b", 0.6)]


def test_arithmetic_is_a_tree_too(here):
    import distmerge

    base, a = distmerge.open("base"), distmerge.open("a")
    (tensor,) = explained(1 - 0.5 * (a - base), "model.norm.weight")["tensors"].values()
    half = {"operator": "*", "of": [{"number": 0.5}, tensor["from"]["of"][1]["of"][1]]}
    assert tensor["from"] == {"operator": "-", "of": [{"number": 1.0}, half]}
    assert [one["model"] for one in half["of"][1]["of"]] == ["a", "base"]


def test_adapters_and_copied_tensors_say_what_they_are(here):
    write(here / "with_ids", 4, **{"model.counter": torch.arange(4)})
    (here / "lora").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (here / "lora/adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    pair = {name.format("A"): torch.ones(2, 4), name.format("B"): torch.ones(4, 2)}
    save_file(pair, here / "lora/adapter_model.safetensors")
    recipe = {
        "merge_method": "linear",
        "models": ["with_ids", "a+lora"],
        "parameters": {"weight": 1},
        "on_missing": "average",
    }
    found = explained(recipe)["tensors"]
    adapted = found["model.layers.1.mlp.up_proj.weight"]["from"]["of"][1]
    assert adapted["made"] == "with the adapter lora"
    assert adapted["files"] == ["model.safetensors", "lora/adapter_model.safetensors"]
    assert "made" not in found["model.layers.2.mlp.up_proj.weight"]["from"]["of"][1]
    copied = found["model.counter"]
    assert (copied["dtype"], copied["not_in"]) == ("I64", ["a+lora"])
    assert copied["from"]["copied"] == "copied"
    assert [one["model"] for one in copied["from"]["of"]] == ["with_ids"]


def test_codes_and_scales_of_an_eight_bit_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tensors = {"model.layers.0.up.weight": torch.ones(128, 128)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    recipe = {"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": 1}}
    found = explained(recipe, out_dtype="float8_e4m3fn")["tensors"]
    assert [one["dtype"] for one in found.values()] == ["F8_E4M3", "F32"]
    scales = found["model.layers.0.up.weight_scale_inv"]["from"]
    assert scales == {"scales": "scales of model.layers.0.up.weight"}


def test_a_name_that_is_nowhere_is_told_with_the_nearest(here):
    with pytest.raises(KeyMismatch, match=r"'model\.layers\.0\.mlp\.up_proj\.wight'") as raised:
        explained(FOUR_LEVELS, "model.layers.0.mlp.up_proj.wight")
    assert "'model.layers.0.mlp.up_proj.weight' is one" in str(raised.value)


def test_the_command(here):
    Path("merge.yml").write_text(json.dumps({**FOUR_LEVELS, "dype": "float32"}))
    shown = call("explain", "merge.yml")
    assert shown.exit_code == 0, shown.output
    assert "Warning: merge.yml, line 1: 'dype' is ignored here" in shown.stderr
    assert "model.layers.{3..4}.mlp.up_proj.weight" in shown.stdout
    assert "a  weight=0.25, density=0.9  layer {1..2}  model.safetensors" in shown.stdout
    assert "outside layer_range" in shown.stdout
    options = ["--set", "parameters.lambda=0.5", "--out-dtype", "float16"]
    found = json.loads(call("explain", "merge.yml", "*embed*", "--json", *options).stdout)
    (tensor,) = found["tensors"].values()
    assert (tensor["dtype"], tensor["from"]["parameters"]["lambda"]) == ("F16", 0.5)
    wrong = call("explain", "merge.yml", "no.such.key")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert wrong.stderr.splitlines()[-1].startswith("Fix: ")
    assert sorted(path.name for path in here.iterdir()) == ["a", "b", "base", "merge.yml"]
