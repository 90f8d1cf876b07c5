"""Methods that are declared seamless give the same bits however wide the blocks are, and only what
the loops can do at any width is declared so."""

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
from distmerge.methods.blocks import BLOCK_ELEMENTS, WIDEST_BLOCK, wide_block
from distmerge.methods.registry import find_method

SEAMLESS = [c for c in CASES if find_method(c.method).is_seamless(c.parameters)]
NAMES = {"linear", "passthrough", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"}
NAMES |= {"dare_linear", "dare_ties"}


def test_which_methods_are_seamless():
    assert {case.method for case in SEAMLESS} <= NAMES
    assert {"linear", "task_arithmetic", "ties", "breadcrumbs"} <= {c.method for c in SEAMLESS}


@pytest.mark.parametrize("rescale", [True, "l1"])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "dare_linear", "dare_ties"])
def test_what_restores_norms_is_not(method, rescale):
    """Floats are added up in the order of blocks."""
    assert not find_method(method).is_seamless({"rescale": rescale})
    assert find_method(method).is_seamless({"rescale": "density"})


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


@pytest.mark.parametrize("case", SEAMLESS, ids=str)
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


@given(st.integers(0, 2**40), st.integers(1, 200))
def test_blocks_are_as_wide_as_leaves_each_thread_a_share(elements, threads):
    width = wide_block(elements, threads)
    assert BLOCK_ELEMENTS <= width <= WIDEST_BLOCK
    assert width == BLOCK_ELEMENTS or elements // width >= 4 * threads
    assert width == BLOCK_ELEMENTS or threads * width <= 16 * 2**20
