"""Which candidates a space has, against itertools and counting."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmerge.errors import RecipeError
from distmerge.sweeps.names import names_of, short_paths
from distmerge.sweeps.space import Space

PATHS = ["parameters.density", "parameters.weight", "models.0.parameters.weight", "seed", "over"]
numbers = st.floats(-10, 10, allow_nan=False) | st.integers(-5, 5)
values = st.lists(numbers | st.sampled_from(["ties", "dare_ties", "org/a"]), min_size=1, max_size=4)
grids = st.dictionaries(st.sampled_from(PATHS), values, max_size=3)


def unique(items):
    found = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


@given(grids.filter(bool))
def test_a_grid_is_the_cartesian_product(grid):
    rows = itertools.product(*grid.values())
    wanted = unique(dict(zip(grid, row, strict=True)) for row in rows)
    assert Space(grid=grid).candidates() == wanted


@given(st.integers(1, 5), st.data())
def test_zipped_lists_go_side_by_side_and_multiply_with_the_rest(length, data):
    row = st.lists(numbers, min_size=length, max_size=length, unique=True)
    zipped = {"parameters.a": data.draw(row), "parameters.b": data.draw(row)}
    found = Space(zip=zipped, grid={"seed": [1, 2]}).candidates()
    assert len(found) == 2 * length
    pairs = list(zip(*zipped.values(), strict=True))
    assert [(c["seed"], c["parameters.a"], c["parameters.b"]) for c in found] == [
        (seed, *pair) for seed in (1, 2) for pair in pairs
    ]


@given(st.integers(1, 6), st.data())
def test_combinations_are_those_of_itertools(count, data):
    least = data.draw(st.integers(1, count))
    most = data.draw(st.integers(least, count))
    names = [f"org/model{i}" for i in range(count)]
    found = Space(combinations={"of": names, "size": f"{least}..{most}"}).candidates()
    chosen = [[item["model"] for item in settings["models"]] for settings in found]
    sizes = range(least, most + 1)
    assert chosen == [list(c) for k in sizes for c in itertools.combinations(names, k)]


@given(grids.filter(bool), st.data())
def test_a_rule_takes_exactly_the_candidates_that_fit_it(grid, data):
    path = data.draw(st.sampled_from(sorted(grid)))
    banned = data.draw(st.sampled_from(grid[path]))
    every = Space(grid=grid).candidates()
    wanted = [settings for settings in every if settings[path] != banned]
    space = Space(grid=grid, exclude=[{path: banned}])
    if wanted:
        assert space.candidates() == wanted
    else:
        with pytest.raises(RecipeError, match="No candidate is left"):
            space.candidates()


def test_rules_for_ranges_lists_and_models():
    grid = {"seed": [1, 2, 3, 4], "over": ["tensor", "model"]}
    found = Space(
        grid=grid, exclude=[{"seed": {"min": 2, "max": 3}}, {"seed": [1], "over": "model"}]
    )
    assert [(c["seed"], c["over"]) for c in found.candidates()] == [
        (1, "tensor"),
        (4, "tensor"),
        (4, "model"),
    ]
    models = Space(
        combinations={"of": ["a", "b", {"model": "c"}], "size": 2},
        exclude=[{"models": {"has": ["a", "c"]}}],
    )
    names = [[m["model"] for m in c["models"]] for c in models.candidates()]
    assert names == [["a", "b"], ["b", "c"]]


ranges = st.tuples(st.floats(-100, 100), st.floats(0, 100)).map(
    lambda at: {"min": at[0], "max": at[0] + at[1]}
)


@given(ranges, st.integers(1, 20), st.integers(0, 99), st.sampled_from(["random", "sobol"]))
def test_samples_lie_in_their_range_and_grow_without_moving(span, count, seed, how):
    over = {"parameters.a": span, "merge_method": ["ties", "linear"]}
    sample = {"over": over, "count": count, "seed": seed, "how": how}
    found = list(Space(sample=sample).sample.choices())
    assert len(found) == count
    assert all(span["min"] <= point["parameters.a"] <= span["max"] for point in found)
    assert all(point["merge_method"] in ("ties", "linear") for point in found)
    assert list(Space(sample=sample).sample.choices()) == found
    more = list(Space(sample={**sample, "count": count + 7}).sample.choices())
    assert more[:count] == found


def test_sobol_points_fill_the_range_evenly():
    over = {"a": {"min": 0, "max": 1}, "b": {"min": 0.01, "max": 100, "log": True}}
    points = list(Space(sample={"over": over, "count": 64}).sample.choices())
    for quarter in range(4):
        assert 15 <= sum(quarter <= 4 * p["a"] < quarter + 1 for p in points) <= 17
        decades = [math.log10(p["b"]) + 2 for p in points]
        assert 15 <= sum(quarter <= d < quarter + 1 for d in decades) <= 17


def test_integers_are_drawn_as_often_as_one_another():
    over = {"seed": {"min": 1, "max": 4, "integer": True}}
    points = list(Space(sample={"over": over, "count": 64}).sample.choices())
    drawn = [point["seed"] for point in points]
    assert {type(one) for one in drawn} == {int}
    assert all(15 <= drawn.count(one) <= 17 for one in (1, 2, 3, 4))


@given(st.lists(grids.filter(bool), min_size=1, max_size=3))
def test_names_are_unique_plain_and_independent_of_other_candidates(parts):
    candidates = unique(s for grid in parts for s in Space(grid=grid).candidates())
    names = names_of(candidates)
    assert len({name.casefold() for name in names}) == len(candidates)
    for name in names:
        assert name.isascii()
        assert 0 < len(name) <= 100
        assert not set(name) & set("/\\ '\"*?<>|:$&;()[]{}#%!")
        assert not name.startswith(".")
    assert names_of(candidates[::-1]) == names[::-1]


def test_names_read_like_this():
    space = Space(
        combinations={"of": ["org/law", "hub/food", "code"], "size": 2},
        grid={
            "merge_method": ["ties"],
            "parameters.density": [0.2],
            "parameters.normalize": [True],
        },
    )
    first = "law+food,ties,density=0.2,normalize=true"
    assert names_of(space.candidates())[0] == first
    assert short_paths(["models.0.parameters.weight", "models.1.parameters.weight", "seed"]) == {
        "models.0.parameters.weight": "models.0.weight",
        "models.1.parameters.weight": "models.1.weight",
        "seed": "seed",
    }
    alike = names_of([{"base_model": "a/x"}, {"base_model": "b/x"}, {"base_model": "y"}])
    assert alike[2] == "y"
    assert alike[0] != alike[1]
    assert all(name.startswith("x-") for name in alike[:2])


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "nothing to sweep over"),
        ({"grid": {"a": range(40), "b": list(range(40))}}, "1,600 candidates"),
        ({"grid": {"a": [1]}, "zip": {"a": [1]}}, "set by grid and by zip"),
        ({"grid": {"a": [1]}, "exclude": [{"b": 1}]}, "exclude names b"),
    ],
)
def test_spaces_without_candidates_are_refused(space, words):
    space = {k: {p: list(v) for p, v in s.items()} if k == "grid" else s for k, s in space.items()}
    with pytest.raises(RecipeError, match=words):
        Space(**space).candidates()
