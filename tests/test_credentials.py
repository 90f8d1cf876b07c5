"""No message repeats a secret, wherever in a recipe or a sweep it was written."""

from __future__ import annotations

import pytest

from distmerge.credentials import redact
from distmerge.errors import CheckpointError, DistmergeError, RecipeError
from distmerge.expressions.recipe import load_recipe
from distmerge.sweeps.definition import load_sweep
from distmerge.sweeps.names import label

SECRET = "hunter22"
LOGIN = f"https://user:{SECRET}@host/model"
LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1.0}\n"


@pytest.mark.parametrize(
    "more",
    [
        f"storage_options: {{key: !{SECRET} x}}",
        f"storage_options: {{key: {{secret: !{SECRET} x}}}}",
        f"storage_options: [{SECRET}]",
        f"storage_options: {{'s3://bucket/': {SECRET}}}",
        "storage_options: {key: 2024-13-45}",
        f"modules: {{{LOGIN!r}: 3}}",
        f"dtype: {LOGIN}",
        f"tokenizer_source: [{LOGIN}]",
        f"chat_template: {LOGIN}",
    ],
)
def test_a_mistake_in_a_recipe_is_told_without_it(more):
    with pytest.raises(DistmergeError) as caught:
        load_recipe(LINEAR + more)
    assert SECRET not in str(caught.value)
    assert "2024-13-45" not in str(caught.value)


@pytest.mark.parametrize(
    "formula",
    [LOGIN, f"'{LOGIN}'", f"a + '{LOGIN}'", f"ties(models=[a, '{LOGIN}'])", f"{'a + ' * 9}{LOGIN}"],
)
def test_a_mistake_in_a_formula_is_told_without_it(formula):
    with pytest.raises(RecipeError) as caught:
        load_recipe({"merge": formula}).request()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        f"{LOGIN!r}: 1",
        f"{LOGIN!r}: 1\n{LOGIN!r}: 2",
        f"storage_options: {{{SECRET}: 1, {SECRET}: 2}}",
    ],
)
def test_a_warning_is_told_without_it(more):
    recipe = load_recipe(LINEAR + more)
    assert recipe.warnings
    assert SECRET not in "".join(recipe.warnings)
    with pytest.raises(RecipeError) as caught:
        load_recipe(LINEAR + more, strict=True)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("space", ["grid: {%s: [%s, x]}", "list: [{%s: %s}]", "zip: {%s: [%s, x]}"])
@pytest.mark.parametrize("path", ["storage_options.secret", "first.storage_options.secret"])
def test_a_sweep_does_not_vary_what_may_be_secret(space, path):
    with pytest.raises(RecipeError, match="can't vary storage options") as caught:
        load_sweep(LINEAR + space % (path, SECRET))
    assert SECRET not in str(caught.value)


def test_names_of_candidates_hold_no_signature():
    assert SECRET not in label(f"s3://bucket/model?signature={SECRET}")
    assert SECRET not in label({"model": f"s3://bucket/model?X-Amz-Signature={SECRET}&x=1"})


def test_an_error_of_another_library_is_told_without_it():
    error = CheckpointError(f"GET {LOGIN}", f"password={SECRET}", fix=f"open {LOGIN}")
    assert SECRET not in repr(error) + str(error) + str(error.__reduce__())
    assert (
        str(error) == "GET https://***@host/model\n  password=***\nFix: open https://***@host/model"
    )


def test_what_is_redacted_stays_so():
    text = f"{LOGIN} Bearer abcdefghijkl AKIAABCDEFGHIJKLMNOP secret: {SECRET}"
    assert redact(redact(text)) == redact(text)


def test_messages_are_bounded_and_terminals_have_nothing_to_obey():
    error = CheckpointError("a\x1b[31m\nb" + "x" * 10**6, "y" * 10**6, fix="z\r" + "z" * 5000)
    text = str(error)
    assert len(text) < 4000
    assert text.count("\n") == 2
    assert "\x1b" not in text
    assert "\r" not in text
