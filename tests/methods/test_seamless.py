"""Methods that are declared seamless give the same bits however wide the blocks are, and only what
the loops can do at any width is declared so."""

from bisect import bisect_left
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.cases import CASES
from methods.trees import plain_loops, programs

from distmerge.expressions.compute_pool import ComputePool
from distmerge.expressions.evaluate import Evaluation
from distmerge.expressions.model_questions import ModelQuestions
from distmerge.expressions.settle import settle
from distmerge.methods.blocks import BLOCK_ELEMENTS, WIDEST_BLOCK, Grid, wide_block
from distmerge.methods.registry import find_method

SEAMLESS = [c for c in CASES if find_method(c.method).is_seamless(c.parameters)]
SUMS_NOTHING = [c for c in SEAMLESS if not c.sums]
NAMES = {"linear", "passthrough", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"}
NAMES |= {"della", "della_linear", "sce"}
NAMES |= {"dare_linear", "dare_ties", "slerp", "nuslerp", "multislerp", "karcher", "model_stock"}


def test_which_methods_are_seamless():
    assert {case.method for case in SEAMLESS} == NAMES
    assert {"linear", "task_arithmetic", "ties", "breadcrumbs"} <= {c.method for c in SUMS_NOTHING}


def test_what_turns_each_row_by_an_angle_of_its_own_is_not():
    nuslerp = find_method("nuslerp")
    assert nuslerp.is_seamless({"weight": [1.0, 1.0]})
    assert not nuslerp.is_seamless({"weight": [1.0, 1.0], "nuslerp_flatten": False})


def in_blocks(case, tensors, width):
    """The result, block by block, as workers make it."""
    names = [*tensors["models"], *([] if tensors["base"] is None else [tensors["base"]])]
    node = case.node([{"w": m} for m in tensors["models"]], _keyed(tensors["base"]))
    program = programs(node)["w"]
    assert program.seamless
    shape = names[0].shape

    def read(leaf, span):
        return node_leaves(node)[leaf].reshape(-1)[span[0] : span[1]]

    pool, questions = ComputePool(2), ModelQuestions()
    try:
        while True:
            evaluation = Evaluation(
                program, tuple(shape), block=width, seed=3, model_answers=questions.known
            )
            settle([evaluation], [read], pool)
            if not questions.fold([evaluation.model_partials]):
                break
        found = pool.map(lambda b: evaluation.block(b, read), range(len(evaluation.grid)))
    finally:
        pool.close()
    return torch.cat(found)


def _keyed(tensor):
    return None if tensor is None else {"w": tensor}


def node_leaves(node):
    """Tensors by the number of their leaf."""
    from distmerge.expressions.alignment import align

    return [leaf["w"] for leaf in align(node).tensors]


@pytest.mark.parametrize("case", SUMS_NOTHING, ids=str)
@settings(max_examples=5, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shape=st.sampled_from([(37, 63), (5000,), (2, 3, 700), (41, 1)]),
    widths=st.lists(st.integers(1, 6000), min_size=2, max_size=2, unique=True),
    plain=st.booleans(),
)
def test_the_width_of_blocks_makes_no_difference(case, dtype, shape, widths, plain):
    tensors = case.tensors(shape, dtype=dtype, seed=sum(shape))
    widths = [max(width, 20) for width in widths]
    if plain:
        with plain_loops():
            first, second = (in_blocks(case, tensors, width) for width in widths)
    else:
        first, second = (in_blocks(case, tensors, width) for width in widths)
    assert torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.mark.parametrize("case", SEAMLESS, ids=str)
@settings(max_examples=2, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shape=st.sampled_from([(1100, 700), (2, 3, 150_001), (800_000,), (2, 600_000)]),
    times=st.integers(2, 4),
    plain=st.booleans(),
)
def test_sums_are_those_of_the_canonical_blocks(case, dtype, shape, times, plain):
    tensors = case.tensors(shape, dtype=dtype, seed=sum(shape))
    step = Grid(shape).step
    assert Grid(shape).elements > 2 * step
    wide = min(times, 2 if shape[-1] == 600_000 else 4) * step
    with plain_loops() if plain else nullcontext():
        narrow, joined = (in_blocks(case, tensors, width) for width in (BLOCK_ELEMENTS, wide))
    assert torch.equal(narrow.view(torch.int32), joined.view(torch.int32))


shapes = st.one_of(
    st.lists(st.integers(0, 2**20), min_size=1, max_size=3).map(tuple),
    st.tuples(st.integers(1, 2**12), st.integers(2**17, 2**21)),
)


@given(shapes, st.integers(1, 200))
def test_blocks_are_as_wide_as_leaves_each_thread_a_share(shape, threads):
    width, narrow = wide_block(shape, threads), Grid(shape)
    assert width <= WIDEST_BLOCK
    if width != BLOCK_ELEMENTS:
        assert width % narrow.step == 0
        assert width > narrow.step
        wide = Grid(shape, width)
        assert wide.elements // width >= 4 * threads
        assert threads * width <= 4 * WIDEST_BLOCK
        assert wide.step == width
        assert wide.whole_rows == narrow.whole_rows


@given(shapes, st.integers(1, 16), st.data())
def test_a_wide_block_is_several_narrow_ones(shape, threads, data):
    narrow, wide = Grid(shape), Grid(shape, wide_block(shape, threads))
    if not len(wide):
        return
    start, stop = wide.span(data.draw(st.integers(0, len(wide) - 1)))
    pieces = [(at, min(at + narrow.step, stop)) for at in range(start, stop, narrow.step)]
    first = bisect_left(range(len(narrow)), start, key=lambda i: narrow.span(i)[0])
    assert pieces == [narrow.span(first + n) for n in range(len(pieces))]
