"""Questions about whole tensors, asked of blocks, against sorts and sums of the whole."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from methods.trees import plain_loops

from distmerge.methods.cutoff import Cut, cutoff
from distmerge.methods.random import Draw
from distmerge.methods.ranks import bucket_of, kept_count
from distmerge.methods.reductions import Again, dots, largest, total
from distmerge.methods.trim import keep_above

FLOATS = {torch.float32: np.float32, torch.float64: np.float64}


@pytest.fixture(params=["fused", "plain"])
def loops(request):
    if request.param == "fused":
        yield
    else:
        with plain_loops():
            yield


def ask(questions, state=None):
    """The answer, the way any runner gets it: passes over all blocks until it is final."""
    while True:
        folded = questions[0].partial(state)
        for question in questions[1:]:
            folded = questions[0].merge(folded, question.partial(state))
        said = questions[0].bare().finish(folded, state)
        if not isinstance(said, Again):
            return said
        state = said.state


def split(x, pieces):
    return [part for part in x.tensor_split(pieces) if part.numel()] or [x]


def sorted_cut(x, keep):
    """(k-th largest magnitude, k, how many are above it, how many equal it), finite ones only."""
    magnitudes = x.abs().flatten()
    magnitudes = magnitudes[magnitudes.isfinite()].sort(descending=True).values
    k = kept_count(keep, magnitudes.numel())
    value = magnitudes[k - 1]
    return value.item(), k, int((magnitudes > value).sum()), int((magnitudes == value).sum())


def assert_exact(cut, x, keep):
    n = int(x.isfinite().sum())
    if kept_count(keep, n) in (0, n):
        whole = keep > 0.0
        assert cut == (Cut(0.0, 1.0) if whole else Cut(math.inf, 0.0))
        return
    value, k, above, equal = sorted_cut(x, keep)
    assert cut.value == value
    assert cut.share == (k - above) / equal


@cache
def light_fine_tune(n, seed=0):
    """A bfloat16 delta: a few hundred distinct magnitudes in tens of thousands of elements."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=generator).mul(0.02).bfloat16()
    tuned = (base.float() + torch.randn(n, generator=generator) * 1e-4).bfloat16()
    return tuned.float() - base.float()


# --- cutoff


@given(
    st.sampled_from([1, 255, 256, 257, 700, 1 << 16]),
    st.dictionaries(st.integers(0, (1 << 16) - 1), st.integers(1, 3), min_size=1, max_size=40),
    st.floats(0, 1),
    st.sampled_from([np.int32, np.int64]),
)
def test_the_bucket_is_that_of_the_rank_from_the_top(size, filled, share, dtype):
    counts = np.zeros(size, dtype)
    for place, count in filled.items():
        counts[place % size] += count
    in_order = np.repeat(np.arange(size), counts)[::-1]
    wanted = 1 + int(share * (len(in_order) - 1))
    bucket, above = bucket_of(counts, wanted)
    assert bucket == in_order[wanted - 1]
    assert above == int((in_order > bucket).sum())


def test_counts_of_blocks_add_up_beyond_32_bits():
    question = cutoff(torch.ones(10), keep=0.5)
    block = question.partial(None)
    block[block > 0] = (1 << 31) - 1
    total = question.merge(question.merge(block.copy(), block), block)
    assert int(total.sum()) == 3 * ((1 << 31) - 1)


finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
finite64 = st.floats(allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 1e-12, 0.5, 0.2])


few = settings(max_examples=40, deadline=None)


@few
@given(arrays.arrays(np.float32, st.integers(1, 60), elements=finite32), shares, st.integers(1, 6))
@example(np.zeros(7, np.float32), 0.3, 2)
@example(np.array([-0.0, 0.0, 1e-45, -1e-45], np.float32), 0.75, 2)
@example(np.full(9, 3.4e38, np.float32), 0.5, 3)
def test_cutoff_of_any_float32(values, keep, pieces):
    x = torch.from_numpy(values)
    assert_exact(ask([cutoff(b, keep=keep) for b in split(x, pieces)]), x, keep)


@few
@given(arrays.arrays(np.float64, st.integers(1, 60), elements=finite64), shares, st.integers(1, 6))
@example(np.array([5e-324, 1.0, 1.7e308, 1.0 + 2**-52]), 0.5, 2)
def test_cutoff_of_any_float64(values, keep, pieces):
    x = torch.from_numpy(values)
    assert_exact(ask([cutoff(b, keep=keep) for b in split(x, pieces)]), x, keep)


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", list(FLOATS))
def test_cutoff_among_many_equals(keep, dtype, loops):
    x = light_fine_tune(40_000).to(dtype)
    assert x.abs().unique().numel() < 1000
    cut = ask([cutoff(block, keep=keep) for block in split(x, 7)])
    assert_exact(cut, x, keep)
    value = x.abs().kthvalue(x.numel() - kept_count(keep, x.numel()) + 1).values
    assert cut.value == value.item()


@pytest.mark.parametrize("dtype", list(FLOATS))
def test_cutoff_keeps_what_is_not_finite_out(dtype, loops):
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0)).to(dtype)
    spoilt = x.clone()
    spoilt[::10] = torch.tensor([math.nan, math.inf, -math.inf]).to(dtype).repeat(34)[:101]
    cut = ask([cutoff(block, keep=0.3) for block in split(spoilt, 3)])
    assert_exact(cut, spoilt, 0.3)
    assert cut == ask([cutoff(x[spoilt.isfinite()], keep=0.3)])


@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_cutoff_of_nothing_finite_keeps_it_visible(keep):
    """Were nothing kept, a tensor of NaN would silently become the base."""
    x = torch.full((5,), math.nan)
    assert keep_above(x, ask([cutoff(x, keep=keep)])).isnan().all()
    assert torch.equal(keep_above(x, ask([cutoff(x, keep=0.0)])), torch.zeros(5))


def test_cutoff_folds_in_any_order(loops):
    x = light_fine_tune(60_000)
    blocks = [cutoff(block, keep=0.2) for block in split(x, 12)]
    assert ask(blocks) == ask(blocks[::-1]) == ask(blocks[5:] + blocks[:5])
    assert blocks[0].exact


def test_kept_count():
    assert [kept_count(d, 10) for d in (0.0, -1.0, 1e-9, 0.29, 0.3, 1.0, 2.0)] == [
        *(0, 0, 1, 2, 3, 10, 10)
    ]
    assert kept_count(0.5, 0) == 0


# --- the sample that saves passes


def narrow():
    """Magnitudes within a tenth of one another, so that a sample of them says much."""
    return 1 + 0.1 * torch.rand(200_000, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("keep", [0.001, 0.2, 0.5, 0.95])
def test_a_fair_sample_saves_the_second_pass(keep, loops):
    x = narrow()
    blocks = [cutoff(block, keep=keep) for block in split(x, 5)]
    begin = blocks[0].bracket(cutoff(x[: x.numel() // 16], keep=keep).partial(None))
    assert begin is not None
    question = cutoff(x, keep=keep)
    assert isinstance(question.finish(question.partial(begin), begin), Cut), "one was enough"
    assert ask(blocks, begin) == ask(blocks)
    assert_exact(ask(blocks, begin), x, keep)


@pytest.mark.parametrize("descending", [True, False])
def test_a_misleading_sample_costs_a_pass_and_no_more(descending, loops):
    """Sorted, the beginning says nothing of the rest."""
    x = narrow().sort(descending=descending).values
    question = cutoff(x, keep=0.4)
    begin = question.bracket(cutoff(x[: x.numel() // 16], keep=0.4).partial(None))
    assert isinstance(question.finish(question.partial(begin), begin), Again), "it missed"
    assert_exact(ask([question], begin), x, 0.4)


def test_a_bracket_keeps_what_is_not_finite_out(loops):
    x = narrow()
    x[::7], x[3::7] = math.inf, math.nan
    question = cutoff(x, keep=0.2)
    begin = question.bracket(question.partial(None))
    assert isinstance(question.finish(question.partial(begin), begin), Cut), "one was enough"
    assert ask([question], begin) == ask([question])
    assert_exact(ask([question], begin), x, 0.2)


def test_a_tensor_may_have_more_equals_than_32_bits_count():
    question = cutoff(torch.ones(2048), keep=0.5)
    begin = question.bracket(question.partial(None))
    said = [question.partial(begin) for _ in range(3)]
    for one in said:
        assert one.counts.sum() == one.counted == 2048
        one.counts *= 1 << 19
        one.counted <<= 19
    total = question.merge(question.merge(said[0], said[1]), said[2])
    assert total.counts.sum() == total.counted == 3 << 30


def test_too_wide_a_guess_is_none():
    """Histograms are faster then; float64 has none at all."""
    sampled = cutoff(torch.randn(1000, generator=torch.Generator().manual_seed(0)), keep=0.2)
    assert sampled.bracket(sampled.partial(None)) is None
    assert cutoff(torch.ones(9).double(), keep=0.2).bracket(np.ones(1 << 16, np.int64)) is None
    for keep in (0.0, 1.0):
        question = cutoff(narrow(), keep=keep)
        assert question.bracket(question.partial(None)) is None


# --- keep_above


@pytest.mark.parametrize("dtype", list(FLOATS))
@pytest.mark.parametrize("keep", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_keep_above_keeps_the_share_asked_for(dtype, keep):
    """All that is above, nothing below, and of the equals as many as the share says: exactly in
    expectation, so within five standard deviations here."""
    x = light_fine_tune(40_000).to(dtype)
    cut = ask([cutoff(x, keep=keep)]).at(Draw(0, (0, "w"), 0))
    kept = keep_above(x, cut)
    assert torch.equal(kept[kept != 0], x[kept != 0])
    if keep in (0.0, 1.0):
        assert torch.equal(kept, x if keep else torch.zeros_like(x))
        return
    value, k, above, equal = sorted_cut(x, keep)
    assert (kept[x.abs() > value] != 0).all()
    assert (kept[x.abs() < value] == 0).all()
    found = int((kept[x.abs() == value] != 0).sum())
    share = (k - above) / equal
    if value > 0:
        assert abs(found - share * equal) <= 5 * math.sqrt(equal * share * (1 - share)) + 1
        assert 1 < equal < x.numel(), "there is something to draw from"


def test_the_share_of_equals_is_exact_in_expectation():
    """Over many seeds, the mean share is what was asked for."""
    x = torch.tensor([2.0, -1.0, 1.0, 1.0, -1.0, 1.0, 0.5, 0.5])
    cut = ask([cutoff(x, keep=0.5)])
    assert (cut.value, cut.share) == (1.0, 3 / 5)
    cuts = [cut.at(Draw(seed, (0, "w"), 0)) for seed in range(2000)]
    draws = [keep_above(x, one).abs().eq(1).sum() for one in cuts]
    mean = torch.stack(draws).double().mean().item()
    assert abs(mean - 3) < 5 * math.sqrt(5 * 0.6 * 0.4 / 2000)


def test_the_draw_among_equals_is_by_position():
    """The same elements are kept, whole or in pieces; another seed keeps others."""
    x = light_fine_tune(50_000)
    cut = ask([cutoff(x, keep=0.2)])

    def kept(pieces, seed):
        starts = np.cumsum([0, *(p.numel() for p in pieces)])
        return torch.cat(
            [
                keep_above(p, cut.at(Draw(seed, (0, "w"), int(s))))
                for p, s in zip(pieces, starts, strict=False)
            ]
        )

    whole = kept([x], 0)
    assert torch.equal(whole, kept(x.tensor_split(9), 0))
    assert not torch.equal(whole, kept([x], 1))


def test_keep_above_takes_any_strides():
    x = light_fine_tune(63 * 100).view(100, 63)
    cut = ask([cutoff(x, keep=0.2)]).at(Draw(0, (0, "w"), 0))
    turned = x.t().contiguous().t()
    assert torch.equal(keep_above(turned, cut), keep_above(x, cut))


def test_not_finite_entries_pass_keep_above():
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 2.0, 3.0])
    kept = keep_above(x, ask([cutoff(x, keep=0.4)]))
    assert kept[:3].isfinite().tolist() == [False] * 3
    assert kept[3:].tolist() == [0.0, 0.0, 3.0]


# --- the whole model


small = arrays.arrays(np.float32, st.integers(1, 20), elements=finite32)


@few
@given(st.lists(small, min_size=1, max_size=5), shares)
def test_cutoff_over_the_model_is_that_of_the_concatenation(tensors, keep):
    tensors = [torch.from_numpy(t) for t in tensors]
    found = ask([cutoff(t, keep=keep, over="model") for t in tensors])
    assert_exact(found, torch.cat(tensors), keep)


def test_cutoff_over_a_model_of_two_precisions(loops):
    """Compared as float32: the count is right, and what is kept keeps its own digits."""
    generator = torch.Generator().manual_seed(0)
    short = torch.randn(5000, generator=generator)
    long = torch.randn(3000, generator=generator, dtype=torch.float64)
    together = torch.cat([short, long.float()])
    for tensors in ([short, long], [long, short]):
        cut = ask([cutoff(t, keep=0.25, over="model") for t in tensors])
        assert_exact(cut, together, 0.25)
    cut = cut.at(Draw(0, (0, "w"), 0))
    kept = [keep_above(short, cut), keep_above(long, cut)]
    assert sum(int((k != 0).sum()) for k in kept) == 2000
    assert kept[1].dtype == torch.float64
    assert torch.equal(kept[1][kept[1] != 0], long[kept[1] != 0])


# --- sums


@pytest.mark.parametrize("over", ["tensor", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dots_are_the_gram_matrix(over, dtype, loops):
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(4, 50_001, generator=generator).to(dtype)
    blocks = [dots(list(part), over=over) for part in xs.tensor_split(7, dim=1)]
    found = ask(blocks)
    wide = xs.double().numpy().astype(np.longdouble)
    expected = np.array([[(x * y).sum() for y in wide] for x in wide])
    assert found.dtype == np.float64
    assert np.array_equal(found, found.T)
    # Of sums of 50,001 terms of magnitude 1; float32 would be off by a millionth.
    assert np.abs(found - expected).max() < 1e-12 * 50_001
    assert not blocks[0].exact


def test_dots_of_tensors_of_any_shape():
    xs = [torch.arange(6.0).view(2, 3), torch.ones(2, 3)]
    assert dots(xs).finish(dots(xs).partial(None), None).tolist() == [[55.0, 15.0], [15.0, 6.0]]


def test_total_and_largest():
    x = torch.randn(10_001, generator=torch.Generator().manual_seed(0))
    blocks = split(x, 4)
    assert abs(ask([total(b) for b in blocks]) - x.double().sum().item()) < 1e-9
    assert ask([largest(b) for b in blocks]) == x.max().item()
    assert ask([largest(b) for b in blocks[::-1]]) == x.max().item()
    assert ask([largest(-b.abs()) for b in blocks]) == -x.abs().min().item()


def test_sums_keep_what_is_not_finite_out(loops):
    x, y = torch.tensor([1.0, math.nan, 3.0, math.inf]), torch.tensor([2.0, 5.0, math.inf, 7.0])
    assert ask([dots([x, y])]).tolist() == [[10.0, 2.0], [2.0, 78.0]]
    assert ask([total(x)]) == 4.0
    assert ask([largest(x)]) == 3.0


def test_of_nothing():
    nothing = torch.empty(0)
    assert ask([total(nothing)]) == 0.0
    assert ask([largest(nothing)]) == -math.inf
    assert ask([dots([nothing, nothing])]).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert ask([largest(torch.tensor([math.nan]))]) == -math.inf


def test_sums_beyond_float64_end():
    """Products of finite numbers may overflow: that is infinite, not endless."""
    huge = torch.full((3,), 1e200, dtype=torch.float64)
    assert ask([dots([huge])]).tolist() == [[math.inf]]


def test_a_bare_question_holds_no_block():
    """What is sent back from a worker is light, and enough to merge and finish."""
    x = torch.randn(1000)
    for question in (cutoff(x, keep=0.2), dots([x, x]), total(x), largest(x)):
        bare = question.bare()
        held = [getattr(bare, name) for name in type(bare).__dataclass_fields__]
        assert not any(isinstance(v, torch.Tensor) and v.numel() for v in held)
        assert getattr(bare, "operands", ()) == ()
        assert bare.over == question.over


# --- a question of one's own


@dataclass(frozen=True)
class Count:
    """How many elements are above a limit, found by halving: many passes."""

    x: torch.Tensor
    over: str = "tensor"
    exact: bool = True

    def partial(self, state):
        return int((self.x > (state or 0)).sum())

    def merge(self, a, b):
        return a + b

    def finish(self, found, state):
        return (state or 0) if found <= 10 else Again((state or 0) + 1)

    def bare(self):
        return Count(self.x.new_empty(0), self.over)


def test_a_question_may_take_any_number_of_passes():
    x = torch.arange(100.0)
    assert ask([Count(block) for block in split(x, 3)]) == 89
