"""Any expression, computed at once, lazily and by plain torch: the same bits."""

from __future__ import annotations

import operator
from functools import reduce

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from distmerge.expressions.lazy import LazyStateDict
from distmerge.expressions.nodes import TensorLeaf
from distmerge.expressions.state_dict import StateDict

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SHAPES = {"weight": (3, 7), "bias": (5,), "scale": (), "empty": (0, 4)}
FLOATS = st.floats(width=32)
NUMBERS = st.integers(-1000, 1000) | st.floats(-1e30, 1e30, allow_subnormal=False)


def tensors():
    made = {key: arrays.arrays(np.float32, shape, elements=FLOATS) for key, shape in SHAPES.items()}
    return st.fixed_dictionaries(made).map(
        lambda found: {key: torch.from_numpy(value.copy()) for key, value in found.items()}
    )


def trees():
    """Formulas over three models: a place, or (sign, side, side), one side at most a number."""
    return st.recursive(
        st.sampled_from([0, 1, 2]),
        lambda below: st.one_of(
            st.tuples(st.sampled_from("+-*/"), below, below),
            st.tuples(st.sampled_from("+-*/"), below, NUMBERS.map(lambda n: [n])).filter(
                lambda tree: tree[0] != "/" or abs(tree[2][0]) > 1e-45  # less is refused
            ),
            st.tuples(st.sampled_from("+-*/"), NUMBERS.map(lambda n: [n]), below).filter(
                lambda tree: tree[:2] != ("+", [0])  # sum()'s, which leaves even -0.0 as it is
            ),
            st.tuples(st.just("negated"), below),
        ),
        max_leaves=8,
    )


def computed(tree, models):
    """The formula by Python's operators, whatever the models are."""
    if isinstance(tree, int):
        return models[tree]
    if isinstance(tree, list):
        return tree[0]
    sign, *sides = tree
    values = [computed(side, models) for side in sides]
    return -values[0] if sign == "negated" else OPERATORS[sign](*values)


def bits(tensor):
    """The bit pattern, all NaNs alike: which NaN comes of two depends on the processor."""
    same = torch.where(torch.isnan(tensor), torch.full_like(tensor, torch.nan), tensor)
    return same.shape, same.contiguous().view(-1).view(torch.int32).tolist()


@settings(max_examples=150, deadline=None)
@given(st.lists(tensors(), min_size=3, max_size=3), trees())
def test_eager_lazy_and_torch_agree_bit_by_bit(models, tree):
    before = [{key: value.clone() for key, value in model.items()} for model in models]
    eager = computed(tree, [StateDict(model) for model in models])
    lazy = computed(tree, [LazyStateDict(TensorLeaf(model)) for model in models])
    collected = lazy.collect()
    assert list(eager) == list(lazy) == list(collected)
    for key in SHAPES:
        expected = bits(computed(tree, [model[key] for model in models]))
        assert bits(eager[key]) == expected
        assert bits(collected[key]) == expected
        assert bits(lazy[key]) == expected
    for model, then in zip(models, before, strict=True):
        assert all(bits(model[key]) == bits(then[key]) for key in SHAPES)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(tensors(), min_size=2, max_size=2),
    st.lists(st.sampled_from("+-*/"), min_size=1, max_size=5),
    st.booleans(),
)
def test_in_place_forms_are_the_others(models, signs, scaled):
    in_place = {"+": operator.iadd, "-": operator.isub, "*": operator.imul, "/": operator.itruediv}
    operand = 0.7 if scaled else models[1]
    start = StateDict(models[0])
    found = reduce(lambda sd, sign: in_place[sign](sd, operand), signs, start)
    expected = reduce(lambda sd, sign: OPERATORS[sign](sd, operand), signs, StateDict(models[0]))
    assert found is start
    assert all(bits(found[key]) == bits(expected[key]) for key in SHAPES)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.just(torch.ones(1)), min_size=1),
    st.dictionaries(st.sampled_from("abcdef"), st.just(torch.ones(1)), min_size=1),
)
def test_common_keys_keep_the_left_order_lazily_too(left, right):
    common = [key for key in left if key in right]
    assert list(StateDict(left).add(right, on_missing="common")) == common
    lazy = LazyStateDict(TensorLeaf(left)).add(right, on_missing="common")
    assert list(lazy) == common
    assert list(lazy.collect()) == common
