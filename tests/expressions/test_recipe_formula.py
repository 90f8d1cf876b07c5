"""Formulas in recipes: what Python's arithmetic builds is the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli.commands import call
from safetensors.torch import load_file, save_file

import distmerge
from distmerge.errors import DistmergeError, ParameterError, RecipeError, UnknownMethod
from distmerge.expressions.recipe import load_recipe
from distmerge.run.merge import plan

NAMES = {"a": "a", "b": {"path": "b"}, "base": "base"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        random = torch.Generator().manual_seed(seed)
        keys = [f"model.layers.{n}.w" for n in range(3)] + ["model.embed"]
        (tmp_path / name).mkdir()
        tensors = {key: torch.randn(4, 5, generator=random) for key in keys}
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


def formula(text: str, **keys):
    return {"models": NAMES, "merge": text, **keys}


METHODS = {name: distmerge.find_method(name) for name in ("linear", "slerp", "dare_ties", "ties")}
SAME = {
    "0.5 * ties(models=[a, b], base=base, density=0.2) + 0.5 * base": lambda base, a, b: (
        0.5 * distmerge.ties([base, a, b], density=0.2) + 0.5 * base
    ),
    "ties([a, b], base=base, k=0.3, weights=[1, -2], scaling=0.9)": lambda base, a, b: (
        distmerge.ties([base, a, b], k=0.3, weights=[1, -2], scaling=0.9)
    ),
    "base + 0.3 * (a - base) - -b / 4": lambda base, a, b: base + 0.3 * (a - base) - -b / 4,
    "1 - a * (1/3)": lambda base, a, b: 1 - a * (1 / 3),
    "linear([a, slerp([b], base=base, t=0.25)], weight=[0.2, 0.8], normalize=false)": (
        lambda base, a, b: METHODS["linear"](
            [a, METHODS["slerp"]([base, b], t=0.25, base_index=0)],
            weight=[0.2, 0.8],
            normalize=False,
        )
    ),
    "dare_ties([a, b], base=base, density=0.5, lambda_=0.9, on_missing='common')": (
        lambda base, a, b: METHODS["dare_ties"](
            [base, a, b], density=0.5, lambda_=0.9, on_missing="common"
        )
    ),
    "linear([a, b], passthrough=['model.embed'])": lambda base, a, b: METHODS["linear"](
        [a, b], passthrough=["model.embed"]
    ),
}


@pytest.mark.parametrize("text", SAME)
def test_it_is_what_python_builds(here, text):
    opened = {name: distmerge.open(name) for name in ("base", "a", "b")}
    python = SAME[text](**opened)
    request = load_recipe(formula(text)).request()
    assert request.root == python.expression
    found, wanted = plan(formula(text, seed=3)), plan(python, seed=3)
    assert found.digest == wanted.digest
    assert str(request.donor) == str(python.request().donor or "base")


def test_it_merges_to_what_plain_torch_computes(here):
    text = "merge: >\n  0.25 * a\n  + 0.75 * b\nmodels: {a: a, b: b}\ndtype: float32\n"
    Path("merge.yml").write_text(text)
    result = call("merge", "merge.yml", "out", "--set", "models.b=base")
    assert result.exit_code == 0, result.output
    a, base, merged = (load_file(f"{n}/model.safetensors") for n in ("a", "base", "out"))
    for key, value in merged.items():
        exact = 0.25 * a[key].double() + 0.75 * base[key].double()
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)


def test_documents_are_used_by_name_in_both_directions(here):
    mixed = {
        "name": "mixed",
        "merge_method": "linear",
        "models": [{"model": "a", "parameters": {"weight": [0, 1]}}, {"model": "b"}],
        "parameters": {"weight": 0.5},
    }
    final = {"models": {"base": "base"}, "merge": "base + 0.8 * (mixed - base)"}
    request = load_recipe([mixed, final]).request()
    assert str(request.root) == (
        "(base + (0.8 * (linear(a, b, weight=[[0, 1], 0.5]) - base)))".replace(
            "[0, 1]", "[0.0, 1.0]"
        )
    )
    assert [name for name, _ in request.intermediates] == ["mixed"]
    part = formula("a - b", name="part")
    outer = {"merge_method": "linear", "models": ["part", "base"], "parameters": {"weight": 1}}
    request = load_recipe([part, outer]).request()
    assert str(request.root) == "linear((a - b), base, weight=[1, 1])"


@pytest.mark.parametrize(
    ("text", "error", "column", "says"),
    [
        ("0.5 * (a +", RecipeError, 7, "can't be read"),
        ("a +* b", RecipeError, 4, "can't be read"),
        ("ties([a, b], base=base, lambda=0.5)", RecipeError, 25, "write lambda_"),
        ("a + b.c", RecipeError, 5, "means nothing"),
        ("a + open('x')", UnknownMethod, 5, "no merge method 'open'"),
        ("a + __import__('os')", UnknownMethod, 5, "no merge method"),
        ("a + (lambda: b)()", RecipeError, 5, "only merge methods"),
        ("[a for a in b]", RecipeError, 1, "means nothing"),
        ("a ** 2", RecipeError, 1, "no arithmetic"),
        ("a if b else base", RecipeError, 1, "means nothing"),
        ("0.5 + 1", RecipeError, 1, "names no model"),
        ("[a, b]", RecipeError, 1, "gives no model"),
        ("a + 'b'", RecipeError, 5, "neither a model nor a number"),
        ("a + true", RecipeError, 5, "neither a model nor a number"),
        ("a * (1 / 0)", RecipeError, 6, "no number"),
        ("b + 1e308 * a", ParameterError, 5, "calculate with 1e+308, which float32 doesn't hold"),
        ("a / 1e-46", ParameterError, 1, "divide by 1e-46"),
        ("a / 0", ParameterError, 1, "divide by 0"),
        ("a / (1 - 1)", ParameterError, 1, "divide by 0"),
        ("b + linear([a, b], weight=[1, 1e39])", ParameterError, 5, "weight can't"),
        ("a + c", RecipeError, 5, "no model is called 'c'"),
        ("a + tie([a, b], base=base)", UnknownMethod, 5, "did you mean 'ties'"),
        ("a + ties([a, b])", RecipeError, 5, "needs a base"),
        ("ties(a, base=base)", RecipeError, 1, "takes a list of models"),
        ("ties([a], base=[base])", RecipeError, 1, "takes a model as base"),
        ("a + ties([b], base=base, densty=1)", ParameterError, 5, "write 'density='"),
        ("ties([b], base=base, density=2)", ParameterError, 1, "density can't be 2"),
        ("ties([a, b], base=base, density=[1])", ParameterError, 1, "1 values for 2 models"),
        ("linear([a, b], out='x')", RecipeError, 20, "can't be given in a formula"),
        ("linear([a, b], **a)", RecipeError, None, "means nothing"),
        ("slerp([a, b, base], t=0.5)", RecipeError, 1, "slerp merges"),
    ],
)
def test_what_is_no_formula_is_refused_where_it_stands(here, text, error, column, says):
    recipe = "models: {a: a, b: b, base: base}\n" + json.dumps({"merge": text})[1:-1]
    with pytest.raises(error) as raised:
        plan(recipe)
    shown = str(raised.value)
    assert says in shown
    assert raised.value.fix
    if column is not None:
        assert f"the recipe, line 2, column {column} of merge" in shown


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("linear([a, b], weight=1e999)", 23, "'1e999' is no number"),
        ("linear([a, b], weight=[-1e999, 1])", 25, "'1e999' is no number"),
        ("linear([a, b], weight='inf')", 1, "weight can't be inf"),
        ("linear([a, b], weight='nan')", 1, "weight can't be nan"),
        ("b + a * (1e308 * 10)", 10, "'1e308 * 10' is no number"),
        ("b + a * 1" + "0" * 400, 9, "is no number"),
        ("a * 1j", 5, "'1j' is no number"),
        ("b + linear([a, b], on_missing='zzz')", 5, "on_missing can't be 'zzz'"),
        ("b + linear([a, b], passthrough=3)", 5, "passthrough can't be 3"),
        ("karcher([a, b], max_iter=1.5)", 1, "max_iter can't be 1.5"),
        ("ties([a], base=b, densty=1)", 1, "has no parameter 'densty'"),
        ("linear([a, b], weight=[1, 2, 3])", 1, "3 values for 2 models"),
        ("slerp([a, b, b], t=0.5)", 1, "slerp merges 2 models"),
    ],
)
def test_what_a_recipe_would_refuse_is_refused_before_a_model_is_opened(text, column, says):
    models = "models: {a: /nowhere/a, b: /nowhere/b}\n"
    with pytest.raises((RecipeError, ParameterError)) as raised:
        plan(models + json.dumps({"merge": text})[1:-1])
    shown = str(raised.value)
    assert says in shown
    assert f"the recipe, line 2, column {column} of merge" in shown
    assert raised.value.fix
    assert "/nowhere" not in shown


def test_keys_of_its_models_without_effect_are_told(here):
    entry = {"path": "a", "revison": "main", "parameters": {"weight": 1}, "density": 1}
    recipe = load_recipe({"models": {"a": entry, "b": {"path": "b", "lora": None}}, "merge": "a+b"})
    assert recipe.warnings == (
        "the recipe, models.a.revison: 'revison' is ignored here; write 'revision'.",
        "the recipe, models.a.parameters: 'parameters' is ignored here; "
        "write them in the formula, NAME(models=[...], weight=0.5).",
        "the recipe, models.a.density: 'density' is ignored here; "
        "write it in the formula, NAME(models=[...], density=...).",
    )
    with pytest.raises(RecipeError, match="without effect"):
        load_recipe({"models": {"a": entry}, "merge": "2 * a"}, strict=True)
    with pytest.raises(RecipeError, match="--set dype: 'dype' is ignored here"):
        load_recipe(formula("a + b + base"), overrides=["dype=float16"])


def test_depth_length_and_wrong_kinds_are_refused(here):
    for text in ("(" * 300 + "a" + ")" * 300, "+".join("a" * 200), "-" * 200 + "a", "a+" * 20_000):
        with pytest.raises(RecipeError):
            load_recipe(formula(text))
    for given in (None, 3, ["a"], ""):
        with pytest.raises(RecipeError, match="merge is a formula"):
            load_recipe({"models": NAMES, "merge": given})
    with pytest.raises(RecipeError, match="given by name"):
        load_recipe({"models": ["a"], "merge": "a"})
    for name in ("a-b", "true", "lambda", "1a"):
        with pytest.raises(RecipeError, match="can't be used in a formula"):
            load_recipe({"models": {name: "a"}, "merge": "a"})
    with pytest.raises(RecipeError, match=r"models\.a"):
        load_recipe({"models": {"a": 3}, "merge": "a"})


@pytest.mark.parametrize(
    "key", ["merge_method", "parameters", "base_model", "slices", "modules", "over", "passthrough"]
)
def test_keys_that_would_say_it_twice_are_refused_with_their_place(here, key):
    with pytest.raises(RecipeError, match=f"'{key}' doesn't go with 'merge:'") as raised:
        load_recipe(formula("a + b", **{key: ["x"]}))
    assert raised.value.fix


def test_keys_and_models_without_effect_are_told(here):
    recipe = load_recipe(formula("a + b", dype="float16"))
    assert [text.split(": ", 1)[1] for text in recipe.warnings] == [
        "'dype' is ignored here; write 'dtype'.",
        "the formula doesn't use 'base'.",
    ]
    with pytest.raises(DistmergeError, match="without effect"):
        load_recipe(formula("a + b"), strict=True)


def test_the_command_line_shows_the_place(here):
    Path("merge.yml").write_text("models: {a: a}\nmerge: 0.5 * a + linear([a, c])\n")
    result = call("merge", "merge.yml", "out")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "merge.yml, line 2, column 22 of merge: no model is called 'c'.",
        "  0.5 * a + linear([a, c])",
        "                       ^",
        "  there are a",
        "Fix: models: {c: org/c}",
    ]
    assert not Path("out").exists()
