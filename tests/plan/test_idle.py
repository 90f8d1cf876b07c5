"""What a recipe says that fits nothing in the files: told when the headers have been read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli.commands import call
from safetensors.torch import save_file

import distmerge
from distmerge.errors import RecipeError
from distmerge.run.merge import plan

KEYS = [
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.{part}.weight" for n in range(3) for part in ("self_attn.q", "mlp.up")),
    "model.norm.weight",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        random = torch.Generator().manual_seed(seed)
        Path(name).mkdir()
        tensors = {key: torch.randn(2, 3, generator=random) for key in KEYS}
        tensors["model.steps"] = torch.tensor([7])
        save_file(tensors, f"{name}/model.safetensors")
    return tmp_path


def recipe(first: Any, general: Any = 1, **keys: Any) -> dict[str, Any]:
    models = [{"model": "a", "parameters": {"weight": first}}, "b"]
    return {
        "merge_method": "linear",
        "models": models,
        "parameters": {"weight": general},
        **keys,
    }


def filters(*pairs: tuple[str | None, Any]) -> list[dict[str, Any]]:
    return [{"filter": f, "value": v} if f else {"value": v} for f, v in pairs]


PLACE = "the recipe, models.0.parameters.weight"
CASES: dict[str, tuple[Any, Any, list[str]]] = {
    "misspelt": (
        filters(("mlp", 2), ("atention", 3), (None, 4)),
        1,
        [
            f"{PLACE}.1: the filter 'atention' is a part of no tensor's name; "
            "the nearest are 'self_attn'."
        ],
    ),
    "alone": (
        {"filter": "self_atn.q", "value": 2},
        1,
        [
            f"{PLACE}: the filter 'self_atn.q' is a part of no tensor's name; "
            "the nearest are 'self_attn.q', 'layers.self_attn'."
        ],
    ),
    "like nothing": (
        filters(("zzzz", 2), (None, 4)),
        1,
        [f"{PLACE}.0: the filter 'zzzz' is a part of no tensor's name; leave it out."],
    ),
    "no patterns": (
        filters(("mlp.*", 2), (None, 4)),
        1,
        [
            f"{PLACE}.0: the filter 'mlp.*' is a part of no tensor's name; "
            "the nearest are 'mlp.up', 'layers.mlp'."
        ],
    ),
    "taken by one before it": (
        filters(("mlp", 2), ("mlp.up", 3), (None, 4)),
        1,
        [
            f"{PLACE}.1: the filter 'mlp.up' has no effect: "
            "what stands before it takes every tensor that it fits."
        ],
    ),
    "after one that takes all": (
        filters((None, 4), ("mlp", 2)),
        1,
        [
            f"{PLACE}.1: the filter 'mlp' has no effect: "
            "what stands before it takes every tensor that it fits."
        ],
    ),
    "of what isn't merged": (
        filters(("steps", 4), (None, 2)),
        1,
        [f"{PLACE}.0: the filter 'steps' has no effect: the tensors that it fits aren't merged."],
    ),
    "of a level that counts less": (
        filters(("mlp", 2)),
        filters(("mpl", 2), (None, 4)),
        [
            "the recipe, parameters.weight.0: the filter 'mpl' is a part of no tensor's name; "
            "the nearest are 'mlp', 'mlp.up'."
        ],
    ),
    "all fit": (filters(("*", 2)), filters(("mlp", [0, 1]), ("attn", 2), (None, 4)), []),
    "a rest of nothing": (filters(("model", 2), (None, 4)), 1, []),
}


@pytest.mark.parametrize("name", CASES)
def test_a_filter_that_fits_nothing_is_told_where_it_stands(here, name):
    first, general, told = CASES[name]
    given = recipe(first, general)
    decided = plan(given)
    near = [text.split("; the nearest are")[0] for text in decided.request.warnings]
    assert near == [text.split("; the nearest are")[0] for text in told]
    for text, wanted in zip(decided.request.warnings, told, strict=True):
        best = wanted.partition("; the nearest are ")[2].split(",")[0].rstrip(".")
        assert best in text
    if told:
        with pytest.raises(RecipeError, match="no effect on these models") as refused:
            plan(given, strict=True)
        assert refused.value.facts == decided.request.warnings
        assert refused.value.fix
    else:
        plan(given, strict=True)


def test_filters_see_each_models_own_names_in_slices_and_count_once_for_all(here):
    weight = filters(("layers.0.", 2), ("layers.2.", 3), ("layers.1.", 5), (None, 1))
    sources = [{"model": "a", "layer_range": [1, 3]}, {"model": "b", "layer_range": [0, 2]}]
    given = {"merge_method": "linear", "slices": [{"sources": sources}]}
    assert plan({**given, "parameters": {"weight": weight}}).request.warnings == ()
    sources[0]["parameters"] = {"weight": weight}
    (told,) = plan({**given, "parameters": {"weight": 1}}).request.warnings
    assert told.startswith("the recipe, slices.0.sources.0.parameters.weight.0: the filter")


def test_filters_of_one_line_and_of_another_document(here):
    text = """
name: inner
merge_method: linear
models: [a, b]
parameters: {weight: [{filter: x1, value: 1}, {filter: mlp, value: 1}, {filter: x2, value: 1}]}
---
merge_method: linear
models: [inner, b]
parameters: {weight: 1}
"""
    text = text.replace("value: 1}]", "value: 1}, {value: 1}]")
    told = plan(text).request.warnings
    assert [one.split(" is a part")[0] for one in told] == [
        "the recipe, line 5: the filter 'x1'",
        "the recipe, line 5: the filter 'x2'",
    ]


def test_other_words_that_fit_nothing_are_refused_by_strict_too(here):
    renamed = recipe(1) | {"models": ["a", {"model": "b", "rename": {"h.": "model."}}]}
    for given, says in (
        (
            recipe(1, passthrough=["lm_head"]),
            "no tensor is called 'lm_head'",
        ),
        (renamed, "no key that rename's 'h.' fits"),
    ):
        (told,) = plan(given).request.warnings
        assert says in told
        with pytest.raises(RecipeError, match="no effect on these models"):
            plan(given, strict=True)
    plan(recipe(1, passthrough=["model.norm"]), strict=True)


def test_every_command_tells_it(here):
    Path("merge.yml").write_text(
        "merge_method: linear\nmodels: [a, b]\nparameters:\n  weight:\n"
        "    - filter: atention\n      value: 2\n    - value: 1\n"
    )
    Path("sweep.yml").write_text("recipe: merge.yml\ngrid: {seed: [1, 2]}\n")
    told = "merge.yml, line 5: the filter 'atention' is a part of no tensor's name"
    commands = {
        "plan": ["plan", "merge.yml"],
        "explain": ["explain", "merge.yml"],
        "merge": ["merge", "merge.yml", "out"],
        "sweep": ["sweep", "sweep.yml", "swept"],
        "what a sweep would do": ["sweep", "sweep.yml", "swept", "--dry-run"],
    }
    for command in commands.values():
        refused = call(*command, "--strict")
        assert refused.exit_code == 2
        assert told in refused.stderr
        assert not Path("out").exists()
        assert not Path("swept").exists()
    for name, command in commands.items():
        result = call(*command)
        assert result.exit_code == 0, (name, result.stderr)
        assert result.stderr.count(told) == 1, name


def test_it_changes_no_byte_and_no_digest(here):
    idle, plain = recipe(filters(("zz", 9), (None, 2))), recipe(filters((None, 2)))
    for name, given in (("idle", idle), ("plain", plain)):
        distmerge.merge(given, name)
    files = [Path(name, "model.safetensors").read_bytes() for name in ("idle", "plain")]
    assert files[0] == files[1]
    text = "merge_method: linear\nmodels: [a, b]\nparameters: {weight: [{value: 2}]}"
    assert plan(text).digest == plan("# moved\n\n" + text).digest
