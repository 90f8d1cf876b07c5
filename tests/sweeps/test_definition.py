"""SWEEP.yaml: a recipe and a space in one file, and what is said of mistakes in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmerge.errors import ParameterError, RecipeError, UnknownMethod
from distmerge.expressions.recipe import load_recipe
from distmerge.expressions.recipe_text import apply_overrides, parse_documents
from distmerge.sweeps.definition import load_sweep, setting_text

RECIPE = """
merge_method: ties
base_model: base
models: [{model: a}, {model: b}]
parameters: {density: 0.3}
"""


def test_a_candidate_is_the_recipe_with_its_settings_by_set():
    sweep = load_sweep(RECIPE + "grid: {parameters.density: [0.2, 1.0e-5], seed: [7]}")
    assert [c.name for c in sweep.candidates] == ["density=0.2,seed=7", "density=1e-05,seed=7"]
    by_hand = load_recipe(RECIPE, overrides=["parameters.density=0.2", "seed=7"])
    first = sweep.candidates[0].recipe
    assert first.model_dump() == by_hand.model_dump()
    assert first.values() == by_hand.values()
    assert load_recipe(first.text).values() == by_hand.values(), "as the output keeps it"
    assert sweep.candidates[1].recipe.values()["density"] == 1e-5


def test_models_are_set_before_what_stands_in_them():
    text = RECIPE + "list: [{models.1.parameters.weight: 0.5, models: [{model: c}, {model: d}]}]"
    models = load_sweep(text).candidates[0].recipe.models
    assert [str(m.model.path) for m in models] == ["c", "d"]
    assert models[1].parameters["weight"] == 0.5


def test_the_recipe_may_lie_in_another_file(tmp_path, monkeypatch):
    (tmp_path / "merge.yml").write_text(RECIPE)
    (tmp_path / "sweep.yml").write_text("recipe: merge.yml\ngrid: {parameters.density: [0.5]}\n")
    sweep = load_sweep(tmp_path / "sweep.yml", overrides=["parameters.weight=2"])
    values = sweep.candidates[0].recipe.values()
    assert values == {"density": 0.5, "weight": 2.0}


scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=20)
scalars |= st.floats(allow_nan=False, allow_infinity=False)


@given(st.recursive(scalars, lambda x: st.lists(x, max_size=3), max_leaves=8))
def test_a_setting_comes_back_from_its_text(value):
    document = parse_documents("merge_method: linear", "r")[0]
    assert apply_overrides(document, [setting_text("a.b", value)]).data["a"] == {"b": value}


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("grid: {parameters.densty: [1]}", ParameterError, ["densty", "density", "candidate"]),
        ("grid: {density: [0.1]}", RecipeError, ["move it under 'parameters:'", "density=0.1"]),
        ("grid: {merge_method: [tise]}", UnknownMethod, ["tise", "in the candidate tise"]),
        ("grid: {models.5.parameters.weight: [1]}", RecipeError, ["leads nowhere", "2 items"]),
        ("grid: {desity: [1]}", RecipeError, ["grid: desity: 'desity' is ignored here"]),
        ("list: [{parameters.desity: 1}]", ParameterError, ["list: parameters.desity", "density"]),
        ("zip: {model.0.parameters.weight: [1]}", RecipeError, ["zip: model.0.parameters.weight"]),
        ("sample: {count: 1, over: {parameters.wight: [1]}}", ParameterError, ["sample: param"]),
        ("grid: {parameters.density: []}", RecipeError, ["line 6", "density: it is empty"]),
        ("sample: {over: {seed: [1, 2]}}", RecipeError, ["how many points"]),
        ("zip: {seed: [1], over: [model, tensor]}", RecipeError, ["line 6", "equally long"]),
        ("combinations: {of: [a, b], size: 3}", RecipeError, ["line 6", "3 can't be chosen"]),
        ("sample: {count: 2, over: {seed: {min: 3, max: 1}}}", RecipeError, ["min 3", "seed"]),
        ("sample: {count: 2, over: {seed: {min: 3, mox: 1}}}", RecipeError, ["2 mistakes", "mox"]),
        ("grids: {seed: [1]}", RecipeError, ["'grids' is no key of a sweep; 'grid' is"]),
        ("grid: {seed: [1]}\nrecipe: other.yml", RecipeError, ["stands beside 'recipe:'"]),
    ],
)
def test_mistakes_are_named_with_their_place(text, kind, words):
    with pytest.raises(kind) as raised:
        load_sweep(RECIPE + text)
    for word in words:
        assert word in str(raised.value)
    assert "--set" not in str(raised.value)
