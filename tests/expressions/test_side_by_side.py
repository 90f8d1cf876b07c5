"""Programs of one key run side by side: who fails takes nothing along of those that follow it."""

import dataclasses

import pytest
import torch
from methods.trees import apply, leaf, programs

from distmerge.errors import MethodError
from distmerge.expressions.compute_pool import ComputePool
from distmerge.expressions.dialogue import SPARE_COUNTS
from distmerge.expressions.evaluate import Evaluation
from distmerge.expressions.nodes import Binary
from distmerge.expressions.settle import settle
from distmerge.expressions.side_by_side import SideBySide
from distmerge.methods.cutoff import cutoff
from distmerge.methods.declare import layer_merge
from distmerge.methods.reductions import largest
from distmerge.methods.trim import keep_above

LARGE = (9000, 63)
"""Three blocks."""
SAMPLED = (20_000, 63)
"""Large enough for a sample to be looked at first."""
MARK = 99.0


def shared(function):
    """As a method of ours: it is given the blocks themselves, which is what can be shared."""
    return dataclasses.replace(layer_merge(blocks="elements")(function), builtin=True)


def scaled(over, *, fails=False):
    """A method that asks one question; whether it fails on the block with the mark."""

    @shared
    def by_largest(models):
        (x,) = models
        if fails and (x == MARK).any():
            raise ValueError("the mark")
        size = yield largest(x, over=over)
        return x / size

    return by_largest


@shared
def lowest(models):
    (x,) = models
    size = yield largest(-x)
    return x / size


def marked(block):
    """Random numbers with a mark in that block."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(LARGE, generator=generator)
    x.view(-1)[block * (x.numel() // 3) + 10_000] = MARK
    return x


def evaluation(node, shape):
    (program,) = programs(node).values()
    return Evaluation(program, shape)


def reader(x):
    return lambda _, span: x.view(-1)[span[0] : span[1]]


def run(x, *nodes):
    """The evaluations after it, their first blocks, and who failed of what."""
    failed = {}
    members = [evaluation(node, tuple(x.shape)) for node in nodes]
    side = SideBySide(members, failed.__contains__, failed.setdefault)
    firsts = settle([side], [reader(x)], ComputePool(2))
    return side, firsts.get(0), failed


@pytest.mark.parametrize("block", range(3))
def test_its_share_in_what_is_asked_of_the_model_is_not_lost(block):
    x = marked(block)
    model = leaf(x)
    nodes = [apply(scaled("model", fails=n == 0), [model]) for n in range(3)]
    side, _, failed = run(x, *nodes)
    assert list(failed) == [0]
    assert isinstance(failed[0], MethodError)
    for member in side.members[1:]:
        ((question, share),) = member.model_partials.values()
        assert question.finish(share, None) == MARK


@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize("more", [False, True], ids=["all of it", "a part of it"])
def test_those_that_follow_get_their_results(block, more):
    x = marked(block)
    model = leaf(x)
    node, expected = apply(scaled("tensor"), [model]), x / MARK
    if more:  # which it has to ask itself, of every block
        node = Binary("+", node, apply(lowest, [model]))
        expected = expected + x / (-x).max()
    side, firsts, failed = run(x, apply(scaled("tensor", fails=True), [model]), node)
    assert list(failed) == [0], failed
    last = [side.members[1].block(b, reader(x)) for b in (1, 2)]
    assert torch.equal(torch.cat([firsts[1], *last]).view(LARGE), expected)


def test_one_that_fails_at_a_sample_takes_none_along():
    @shared
    def of_half(models):
        cut = yield cutoff(models[0].half(), keep=0.3)  # which has no such levels
        return keep_above(models[0], cut)

    @shared
    def of_all(models):
        cut = yield cutoff(models[0], keep=0.3)
        return keep_above(models[0], cut)

    x = 1 + torch.rand(SAMPLED, generator=torch.Generator().manual_seed(0))
    nodes = [apply(method, [leaf(x)]) for method in (of_half, of_all)]
    side, _, failed = run(x, *nodes)
    assert list(failed) == [0], failed
    found = torch.cat([side.members[1].block(b, reader(x)) for b in range(len(side.grid))])
    k = int(0.3 * x.numel())
    assert abs(int((found != 0).sum()) - k) <= 5
    assert found[found != 0].min() >= x.view(-1).kthvalue(x.numel() - k).values


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_all_that_samples_count_is_counted(threads):
    """Threads add to counts in turn; more of them than there are counts kept."""
    x = 1 + torch.rand(SAMPLED, generator=torch.Generator().manual_seed(0))
    node = apply("ties", [leaf(x)], leaf(torch.zeros_like(x)), parameters={"weight": [1.0]})
    one = evaluation(node, SAMPLED)
    given = [x.view(-1), torch.zeros(x.numel())]

    def read(number, span):
        return given[number][span[0] : span[1]]

    blocks = list(one.sampled) * 20
    ComputePool(threads).map(lambda b: one.sample(b, read), blocks)
    (dialogue,) = one._dialogues.values()
    ((_, counted),) = dialogue._sampled.values()
    assert 1 <= len(counted) <= SPARE_COUNTS
    spans = [one.sample_span(block) for block in blocks]
    assert sum(counted).sum() == sum(stop - start for start, stop in spans)
