"""YAML with lines, against PyYAML's own safe_load."""

from __future__ import annotations

import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distmerge.errors import RecipeError
from distmerge.expressions.yaml_lines import read_yaml, read_yaml_documents

words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=8)
scalars = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-9, 9) | words
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(words, inner), max_leaves=12
)


@given(values)
def test_reads_what_safe_load_reads(data):
    text = yaml.safe_dump(data, allow_unicode=True, sort_keys=False)
    assert read_yaml(text, "recipe").data == data


MERGED = """
base: &base {a: 1, b: {c: 2}}
other: &other {a: 3, d: 4}
one: {<<: *base, a: 5}
late:
  a: 6
  <<: *base
both: {<<: [*base, *other]}
again: *base
"""


def test_anchors_and_merges():
    assert read_yaml(MERGED, "recipe").data == yaml.safe_load(MERGED)
    assert read_yaml(MERGED, "recipe").warnings == []


def test_keys_stay_words():
    found = read_yaml("on: {yes: 1, 3: x, null: y}", "recipe").data
    assert found == {"on": {"yes": 1, "3": "x", "null": "y"}}


def test_lines():
    found = read_yaml("a: 1\n\nmodels:\n  - model: x\n  # note\n  - {model: y, p: [1,\n 2]}\n", "r")
    assert found.lines == {
        ("a",): 1,
        ("models",): 3,
        ("models", 0): 4,
        ("models", 0, "model"): 4,
        ("models", 1): 6,
        ("models", 1, "model"): 6,
        ("models", 1, "p"): 6,
        ("models", 1, "p", 0): 6,
        ("models", 1, "p", 1): 7,
    }


def test_a_key_given_twice_is_told_and_the_last_counts():
    found = read_yaml("a: 1\nb: 2\na: 3\n", "merge.yml")
    assert found.data == {"a": 3, "b": 2}
    assert found.warnings == ["merge.yml, line 3: 'a' is given twice; the last one counts."]


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGED_LAUGHS = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "headline"),
    [
        (LAUGHS, "expands to more than 100,000 values"),
        ("a: [" + "1, " * 100_001 + "1]", "holds more than 100,000 values"),
        (MERGED_LAUGHS, "expands to more than 100,000 values"),
        ("a: &a [*a]", "nested more than 50 levels"),
        ("a: &a {<<: *a}", "nested more than 50 levels"),
        ("[" * 60 + "]" * 60, "nested more than 50 levels"),
        ("[" * 100_000, "nested more than 50 levels"),
        ("a: 1\n--- \nb: 2\n", "several documents"),
        ("a: {<<: 3}", "'<<' takes a mapping"),
        ("{[1, 2]: 3}", "a key is a list or a mapping"),
        ("? {a: 1}\n: 3", "a key is a list or a mapping"),
        ("a: 2024-13-45", "line 1: '2024-13-45' can't be read"),
        ("a: " + "9" * 5000, "can't be read"),
        ("a: !!python/object/apply:os.system ['true']", "line 1: 'tag:yaml.org,2002:python/object"),
        ("a: !!python/name:os.system", "line 1: 'tag:yaml.org,2002:python/name"),
        ("a: !mine 3", "line 1: '!mine' is no kind of value"),
        ("a: 1\nb: \x07", "line 2: this is not YAML"),
    ],
)
def test_refused(text, headline):
    started = time.monotonic()
    with pytest.raises(RecipeError) as raised:
        read_yaml(text, "merge.yml")
    assert headline in raised.value.headline
    assert raised.value.headline.startswith("merge.yml")
    assert raised.value.fix
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("a: 1\n\tb: 2\n", "line 2, column 1", "\\t"),
        ("a: 1\n b: 2\n", "line 2, column 3", "mapping values"),
        ("models: [a, b\nc: 1\n", "line 2, column 2", "expected ',' or ']'"),
        ('path: "C:\\models\\x"\n', "line 1, column 11", "escape"),
        ("a: *nowhere\n", "line 1, column 4", "undefined alias"),
    ],
)
def test_malformed_names_line_and_column(text, place, reason):
    with pytest.raises(RecipeError) as raised:
        read_yaml(text, "merge.yml")
    assert raised.value.headline == f"merge.yml, {place}: this is not YAML."
    assert reason in raised.value.facts[0]


def test_several_documents_keep_the_lines_of_the_file():
    first, second = read_yaml_documents("a: 1\n---\n\nb: 2\n---\n", "merge.yml")
    assert (first.data, second.data) == ({"a": 1}, {"b": 2})
    assert second.lines == {("b",): 4}


def test_a_document_may_end_in_dashes_or_be_empty():
    assert read_yaml("---\na: 1\n---\n", "recipe").data == {"a": 1}
    assert read_yaml("", "recipe").data is None
    assert read_yaml("# nothing\n", "recipe").data is None
