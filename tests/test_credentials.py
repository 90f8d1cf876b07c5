"""No message repeats a secret, wherever in a recipe or a sweep it was written."""

from __future__ import annotations

import time

import pytest
import yaml

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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https:/user:hunter22@host/x", "https:/***@host/x"),
        ("https:user:hunter22@host/x", "***@host/x"),
        ("https:///user:hunter22@host/x", "https:///***@host/x"),
        ("https://user:hun/ter22@host/x", "https://***@host/x"),
        ("There is no 'user:hunter22@host/y'.", "There is no '***@host/y'."),
        ("//user:hunter22@host/x", "//***@host/x"),
        ("Authorization: Basic hunter22==", "Authorization: ***"),
        ("{secret: {a: hunter22}, b: 1}", "{secret: ***, b: 1}"),
        ("{private_key: !!str hunter22, b: 1}", "{private_key: ***, b: 1}"),
        ('passphrase: "hun\\"ter22"', "passphrase: ***"),
        ("a:\n- password: |\n    hun\n    ter22\n  b: 1", "a:\n- password: ***\n  b: 1"),
        ("api_key: hun ter22\nb: 1", "api_key: ***\nb: 1"),
        ("secret:\n- hun\n- ter22\nb: 1", "secret: ***\nb: 1"),
    ],
)
def test_a_secret_is_taken_out_wherever_it_ends(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "model: org/name@main",
        "hf:/org/name@main",
        "http://host:8080/x@y, 12:30@x",
        "image:5000/x@sha256:abc",
        "tokenizer_source: base\ntokenizer:\n  tokens:\n    token: {source: base}",
        "source: {kind: model_token, model: a, token: '<s>'}",
        "parameters: {key: lm_head, weight: [{filter: key, value: 1}]}",
        "rename: {key: token}\nchat_template: |\n  token: {{ key }}\n  secret",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


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


KEYS = f"{{'s3://b/': {{key: id, secret: {SECRET}}}}}"


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (f"storage_option: {KEYS}", "storage_option"),
        (f"storage-options: {KEYS}", "storage-options"),
        (f"StorageOptions: {{key: {SECRET}}}", "StorageOptions"),
        (f"storgae_options: {{key: {SECRET}}}", "storgae_options"),
        (f"client_kwargs: {{endpoint_url: {SECRET}}}", "client_kwargs"),
        (f"key: {SECRET}", "key"),
        (f"token: {SECRET}", "token"),
        (f"fsspec: {KEYS}", "fsspec"),
        (f"x: [{{a: {KEYS}}}]", "x"),
        (f"base_model: {{path: a, storage_options: {KEYS}}}", "storage_options"),
        (f"tokenizer_source: {{path: a, secret: {SECRET}}}", "secret"),
        (f"tokenizer: {{source: {{path: a, token: {SECRET}, api_key: 1}}}}", "api_key"),
        ("tokenizer: {tokens: {t: {source: {path: a, password: 1}}}}", "password"),
        (f"storage_options: {KEYS}\nsecret: {SECRET}", "secret"),
    ],
)
def test_storage_options_elsewhere_are_refused(more, name):
    recipe = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n" + more
    formula = {"merge": "a + b", **yaml.safe_load(more)}
    for source in (recipe, *([] if "base_model" in more else [formula])):
        with pytest.raises(RecipeError, match=f"{name}' is not read") as caught:
            load_recipe(source)
        assert SECRET not in str(caught.value)
        assert "storage_options: {'s3://bucket/'" in (caught.value.fix or "")


@pytest.mark.parametrize("place", ["models", "slices", "parameters", "modules", "any", "formula"])
def test_storage_options_inside_another_key_are_refused(place, tmp_path):
    options = {"storage_options": {"secret": SECRET}}
    model = {"model": "a", **options}
    (tmp_path / "m.py").write_text("def any(models, **kw):\n    return models[0]\n")
    given = {
        "models": {"merge_method": "linear", "models": [model]},
        "slices": {"merge_method": "linear", "slices": [{"sources": [model]}]},
        "parameters": {"merge_method": "linear", "models": ["a"], "parameters": options},
        "modules": {"merge_method": "linear", "modules": {"m": {"models": ["a"], **options}}},
        "any": {"merge_method": f"{tmp_path}/m.py:any", "models": ["a"], "parameters": options},
        "formula": {"merge": "x", "models": {"x": {"path": "a", **options}}},
    }[place]
    with pytest.raises(RecipeError, match="'storage_options' is not read at") as caught:
        load_recipe(given)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        "tokenizer: {source: base, tokens: {key: {source: a}, token: {source: a}}}",
        "x-note: {key: of the recipe, filter: secretary}",
        "tokenizer: {token: {t: {source: a}}}",
        f"x: &x {KEYS}\nstorage_options: *x",
        "options: 1",
    ],
)
def test_other_keys_are_as_they_were(more):
    recipe = load_recipe(LINEAR + more)
    assert SECRET not in recipe.text
    assert recipe.text == LINEAR + more or "storage_options" in more
    unused = load_recipe({"merge": "a", "models": {"a": "x", "token": "y"}})
    assert "doesn't use 'token'" in unused.warnings[0]


@pytest.mark.parametrize("gap", ["", "   "])
@pytest.mark.parametrize("style", ["|", "'"])
def test_a_secret_of_several_lines_goes_whole(style, gap):
    """PyYAML writes the line breaks of a string as empty lines."""
    told = yaml.safe_dump({"private_key": f"one\n\n{SECRET}\n", "z": 1}, default_style=style)
    assert SECRET not in redact(told.replace("\n\n", f"\n{gap}\n"))
    assert "z" in redact(told)


@pytest.mark.parametrize("word", ["a://", "https:", "secret", "x:y", "?sig", "secret: {", 'key: "'])
def test_texts_of_any_kind_are_looked_through_in_time_that_grows_with_their_length(word):
    began = time.monotonic()
    redact(word * (200_000 // len(word)))
    assert time.monotonic() - began < 5  # a minute and more where repeats aren't bounded
