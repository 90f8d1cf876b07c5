"""Where recipes come from, and what --set does to them."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distmerge.errors import RecipeError
from distmerge.expressions.recipe_files import LARGEST_RECIPE
from distmerge.expressions.recipe_text import (
    Document,
    apply_overrides,
    read_documents,
)


def read_document(source) -> Document:
    (document,) = read_documents(source)
    return document


TEXT = """\
merge_method: ties
models:
  - model: a
    parameters: {weight: 1}
  - model: b
    parameters:
      weight: [0, 1]
"""


def test_sources_agree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("merge.yml").write_text(TEXT)
    Path("bom.yml").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    expected = yaml.safe_load(TEXT)
    for source in ("merge.yml", Path("merge.yml"), "./bom.yml", TEXT, expected, "-"):
        assert read_document(source).data == expected, source


def test_one_line_of_yaml_is_text_unless_it_names_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line = "{merge_method: linear, models: [a]}"
    assert read_document(one_line).data == {"merge_method": "linear", "models": ["a"]}
    Path("odd: name").write_text("merge_method: slerp")
    assert read_document("odd: name").data == {"merge_method": "slerp"}


def test_a_mapping_may_hold_numpy_numbers_tuples_and_paths():
    given_ = {"seed": np.int64(3), "models": ({"model": Path("x/y")},), 4: None}
    assert read_document(given_).data == {"seed": 3, "models": [{"model": "x/y"}], "4": None}


@pytest.mark.parametrize(
    ("source", "headline"),
    [
        ("nope.yml", "There is no recipe 'nope.yml'."),
        ("C:\\merges\\nope.yml", "There is no recipe 'C:\\\\merges\\\\nope.yml'."),
        ("s3://key:secret@bucket/merge.yml", "There is no recipe 's3://***@bucket/merge.yml'."),
        ("folder", "folder is a directory, not a recipe."),
        ("weights.bin", "weights.bin is not text."),
        ("huge.yml", "huge.yml is too large for a recipe."),
        ("list.yml", "list.yml holds a list, and a recipe is a mapping of keys to values."),
        ("empty.yml", "empty.yml holds nothing, and a recipe is a mapping of keys to values."),
        ("nul\0.yml", "'nul\\x00.yml' can't be read."),
        ({"models": [object()]}, "models.0 is of type object, which a recipe can't hold."),
    ],
)
def test_what_is_no_recipe(tmp_path, monkeypatch, source, headline):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("weights.bin").write_bytes(b"\x80\x02\xff")
    Path("huge.yml").write_text("#" * (LARGEST_RECIPE + 1))
    Path("list.yml").write_text("- a\n- b\n")
    Path("empty.yml").write_text("# nothing yet\n")
    with pytest.raises(RecipeError) as raised:
        read_document(source)
    assert raised.value.headline == headline
    assert raised.value.fix


def test_where():
    document = read_document(TEXT)
    assert document.where(("models", 1, "parameters", "weight", 1)) == "the recipe, line 7"
    assert document.where(("models", 1, "parameters", "density")) == "the recipe, line 6"
    changed = apply_overrides(document, ["models.1.parameters.weight=3"])
    place = ("models", 1, "parameters", "weight")
    assert changed.where(place) == "--set models.1.parameters.weight"
    assert read_document({"seed": 1}).where(("seed",)) == "the recipe, seed"


def test_overrides():
    document = read_document(TEXT)
    changed = apply_overrides(
        document,
        [
            "models.0.parameters.weight=0.4",
            "models.1.parameters.weight.1=[2, 3]",
            "parameters.density={filter: mlp, value: 1e-1}",
            "base_model=org/base@main",
            "seed=",
            "merge_method=a=b",
        ],
    )
    assert changed.data == {
        "merge_method": "a=b",
        "models": [
            {"model": "a", "parameters": {"weight": 0.4}},
            {"model": "b", "parameters": {"weight": [0, [2, 3]]}},
        ],
        "parameters": {"density": {"filter": "mlp", "value": "1e-1"}},
        "base_model": "org/base@main",
        "seed": None,
    }
    assert document.data == yaml.safe_load(TEXT), "the original is left alone"


@pytest.mark.parametrize(
    ("override", "fact"),
    [
        ("models.2.model=c", "models has 2 items, counted from 0"),
        ("models.first.model=c", "models has 2 items, counted from 0"),
        ("models.-1.model=c", "models has 2 items, counted from 0"),
        ("merge_method.name=c", "merge_method is a word or a sentence"),
        ("models.0.parameters.weight.x=1", "models.0.parameters.weight is the value 1"),
    ],
)
def test_overrides_that_lead_nowhere(override, fact):
    with pytest.raises(RecipeError, match="leads nowhere") as raised:
        apply_overrides(read_document(TEXT), [override])
    assert raised.value.facts == (fact,)


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=3", ".a=3", "seed: 3"])
def test_overrides_of_the_wrong_form(override):
    with pytest.raises(RecipeError, match="not of the form key=value"):
        apply_overrides(read_document(TEXT), [override])


def test_an_override_that_is_not_yaml_names_itself():
    with pytest.raises(RecipeError, match=r"--set seed, line 1, column 3: this is not YAML"):
        apply_overrides(read_document(TEXT), ["seed=[1"])


keys = st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
plain = (
    st.none() | st.booleans() | st.integers() | st.floats(-9, 9) | st.text("abc :#-é", max_size=6)
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault of the data
@given(st.lists(keys, min_size=1, max_size=4), st.recursive(plain, st.lists, max_leaves=4))
def test_what_was_set_is_there(path, value):
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n")
    changed = apply_overrides(read_document({}), [f"{'.'.join(path)}={text}"])
    place = changed.data
    for key in path:
        place = place[key]
    assert place == value
    assert changed.where(tuple(path)) == f"--set {'.'.join(path)}"


@pytest.mark.parametrize(
    ("stream", "headline"),
    [
        (io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"), "standard input is not text."),
        (None, "standard input can't be read."),
    ],
)
def test_standard_input_that_is_no_text(monkeypatch, stream, headline):
    monkeypatch.setattr(sys, "stdin", stream)
    with pytest.raises(RecipeError, match=headline) as refused:
        read_documents("-")
    assert refused.value.fix
