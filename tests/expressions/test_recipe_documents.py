"""Recipes of several documents, and of modules, before and after their models are opened."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from distmerge.errors import RecipeError
from distmerge.expressions.nodes import walk
from distmerge.expressions.recipe import load_recipe
from distmerge.run.merge import plan

KEYS = (
    "lm_head.weight",
    "model.language_model.embed_tokens.weight",
    *(f"model.language_model.layers.{n}.mlp.weight" for n in range(3)),
    "model.language_model.norm.weight",
    *(f"model.vision_tower.layers.{n}.mlp.weight" for n in range(3)),
    "model.multi_modal_projector.weight",
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        random = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(2, 2, generator=random) for key in KEYS}
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


def document(name: str | None, *models: str, **keys) -> dict:
    named = {} if name is None else {"name": name}
    return {
        **named,
        "merge_method": "linear",
        "models": [*models],
        "parameters": {"weight": 1.0},
        **keys,
    }


def formula(*documents: dict, **options) -> str:
    return str(load_recipe(documents, **options).request().root)


def test_documents_nest_in_any_order_and_depth(here):
    final = document(None, "two", "b")
    one, two = document("one", "a", "b"), document("two", "one", "base")
    expected = "linear(linear(linear(a, b, weight=[1, 1]), base, weight=[1, 1]), b, weight=[1, 1])"
    assert formula(final, one, two) == formula(two, final, one) == expected
    request = load_recipe([final, one, two]).request()
    assert [name for name, _ in request.intermediates] == ["one", "two"]
    assert str(request.donor) == "a"


def test_a_document_may_be_the_base_and_is_the_donor_then(here):
    one = document("one", "a", "b")
    final = {
        "merge_method": "ties",
        "base_model": "one",
        "models": ["a", "base"],
        "parameters": {"weight": 1.0},
    }
    request = load_recipe([one, final]).request()
    assert str(request.root).startswith("ties(a, base, base=linear(a, b")
    assert str(request.donor) == "a"


def test_if_all_have_names_the_one_that_nothing_uses_comes_out(here):
    assert formula(document("one", "a"), document("two", "one")) == (
        "linear(linear(a, weight=[1]), weight=[1])"
    )


def test_a_document_without_use_is_told(here):
    recipe = load_recipe([document("one", "a"), document(None, "b")])
    (warning,) = recipe.warnings
    assert "nothing uses 'one', so it is not merged" in warning


def test_overrides_go_to_the_document_they_name(here):
    documents = document("one", "a", "b"), document(None, "one", "base")
    found = formula(*documents, overrides=["one.parameters.weight=2", "parameters.weight=3"])
    assert found == "linear(linear(a, b, weight=[2, 2]), base, weight=[3, 3])"


@pytest.mark.parametrize(
    ("documents", "headline"),
    [
        ([document(None, "a"), document(None, "b")], "writes one merge"),
        ([document("x", "a"), document("y", "b")], "writes one merge"),
        ([document("x", "a"), document("x", "b"), document(None, "x")], "two documents are called"),
        ([document("x", "y"), document("y", "x"), document(None, "x")], "'x' needs itself"),
        ([document("x", "x"), document(None, "x")], "'x' needs itself"),
    ],
)
def test_documents_that_make_no_sense(documents, headline):
    with pytest.raises(RecipeError, match=headline) as raised:
        load_recipe(documents)
    assert raised.value.fix


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"model": "x", "lora": "adapter"}, "takes no adapter"),
        ({"path": "x", "revision": "v2"}, "takes no revision"),
        ({"model": {"path": "x", "revision": "v2"}, "lora": "adapter"}, "takes no adapter"),
    ],
)
@pytest.mark.parametrize("where", ["models", "base_model", "config_from", "slices", "merge"])
def test_a_document_takes_no_adapter_and_no_revision(given, what, where):
    source = {"model": given, "layer_range": [0, 1]}
    final = {
        "models": document(None) | {"models": [{"model": given}]},
        "slices": document(None) | {"models": None, "slices": [{"sources": [source]}]},
        "merge": {"models": {"m": given}, "merge": "2 * m"},
    }.get(where, document(None, "a", **{where: given}))
    with pytest.raises(RecipeError, match=f"'x' is another document .* {what}") as raised:
        load_recipe([document("x", "a", "b"), final])
    assert raised.value.fix


def test_modules_are_merged_apart(here):
    weighted = [{"model": "a", "parameters": {"weight": 3.0}}, {"model": "b"}]
    sliced = [
        {"sources": [{"model": m, "layer_range": [0, 2]}, {"model": "b", "layer_range": [1, 3]}]}
        for m in ("a", "base")
    ]
    decided = plan(
        {
            "merge_method": "linear",
            "parameters": {"weight": 1.0},
            "modules": {
                "text_decoder": {"slices": sliced, "parameters": {"weight": 2.0}},
                "vision_tower": {"models": weighted},
                "default": {"models": ["base"]},
            },
        }
    )
    programs = {t.program.key: t.program for u in decided.units for t in u.tasks}
    weights = {key: program.steps[-1].parameters["weight"] for key, program in programs.items()}
    names = {
        key: [str(decided.inputs.leaves[i]) for i in program.leaves]
        for key, program in programs.items()
    }
    assert [key for key in programs if "language_model.layers" in key] == [
        f"model.language_model.layers.{n}.mlp.weight" for n in range(4)
    ]
    assert weights["model.vision_tower.layers.0.mlp.weight"] == [3.0, 1.0]
    assert weights["model.language_model.layers.3.mlp.weight"] == [2.0, 2.0]
    assert names["lm_head.weight"] == ["base"], "the rest"
    assert names["model.multi_modal_projector.weight"] == ["base"]


def test_a_head_beside_the_modules_goes_with_the_language_model(here):
    modules = {
        "vision_tower": {"models": ["a"]},
        "text_decoder": {"models": ["b"]},
        "multi_modal_projector": {"models": ["base"]},
    }
    keys = {"merge_method": "linear", "parameters": {"weight": 1}}
    decided = plan({**keys, "modules": modules})
    task = next(t for t in decided.units[0].tasks if t.program.key == "lm_head.weight")
    assert [str(decided.inputs.leaves[i]) for i in task.program.leaves] == ["b"]


def test_a_tensor_in_no_module_and_a_module_without_tensors_are_refused(here):
    models = {"models": ["a", "b"]}
    keys = {"merge_method": "linear", "parameters": {"weight": 1}}
    with pytest.raises(RecipeError, match="4 tensors are in none of the modules") as raised:
        plan({**keys, "modules": {"text_decoder": models}})
    assert "default" in raised.value.fix
    with pytest.raises(RecipeError, match="no tensor's name has a part 'audio_tower'"):
        plan({**keys, "modules": {"audio_tower": models, "default": models}})


def test_slices_of_a_model_with_two_families_need_modules(here):
    sources = [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]
    with pytest.raises(RecipeError, match="which layers do slices of a mean") as raised:
        plan({"merge_method": "passthrough", "slices": sources})
    assert "modules" in raised.value.fix


def chained(count: int) -> list[dict]:
    """Each uses the two before it."""
    names = ["a", "b", *(f"d{i}" for i in range(count - 1)), None]
    return [document(names[i + 2], names[i], names[i + 1]) for i in range(count)]


def test_a_document_is_one_node_for_all_that_use_it(here):
    request = load_recipe(chained(12)).request()
    assert len(list(walk(request.root))) == 12 + 2
    assert request.root.size == 753
    (program, *_) = (task.program for unit in plan(request).units for task in unit.tasks)
    assert len(program.steps) == 12 + 2


@pytest.mark.parametrize(
    ("documents", "headline"),
    [
        (chained(40), "the merge uses its own parts too often."),
        (
            [
                {"name": "d0", "models": {"x": "a"}, "merge": "x + x"},
                *({"name": f"d{i}", "merge": f"d{i - 1} + d{i - 1}"} for i in range(1, 40)),
            ],
            "the merge uses its own parts too often.",
        ),
        (
            [document("d0", "a"), *(document(f"d{i}", f"d{i - 1}") for i in range(1, 400))],
            "The documents of a recipe are nested too deeply.",
        ),
    ],
)
def test_documents_that_nobody_could_write_out_are_refused(documents, headline):
    with pytest.raises(RecipeError, match=headline) as refused:
        load_recipe(documents)
    assert refused.value.fix


def test_a_deep_chain_is_planned_in_time_that_grows_with_its_length(here):
    deep = [document("d0", "a"), *(document(f"d{i}", f"d{i - 1}", "b") for i in range(1, 40))]
    assert len(plan(load_recipe(deep).request()).digest) == 32
