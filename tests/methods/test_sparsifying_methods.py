"""The methods that thin out task vectors, against formulas and by hand; questions and loops that
only they use."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given as drawn_from
from hypothesis import settings
from hypothesis import strategies as st
from methods import formulas
from methods.formulas import float64
from methods.inputs import DTYPES, Models, assert_close
from methods.trees import apply, merge, merged, plain_loops, programs

from distmerge.errors import ParameterError
from distmerge.expressions.alignment import align
from distmerge.expressions.compute_pool import ComputePool
from distmerge.expressions.evaluate import Evaluation
from distmerge.expressions.settle import settle
from distmerge.methods.bands import BandCut, band
from distmerge.methods.cutoff import Bracket, Cut, cutoff
from distmerge.methods.difference import Difference, Spread, Thinned, computed, runs_of
from distmerge.methods.fusion import fused_for
from distmerge.methods.random import Draw, Remembered
from distmerge.methods.rank_kernels import CELLS, _cell_chances
from distmerge.methods.reductions import Again, Norm, Norms, mean_square
from distmerge.methods.sce import selected, spread
from distmerge.methods.sharing import shared
from distmerge.methods.sparsify import chances, keep_at_random, keep_by_rank
from distmerge.methods.trim import keep_above, keep_band, trim

WEIGHTS = [0.7, 0.2, 0.45]
SIGNED = [0.9, -0.4, 0.3]
DRAW = Draw(0, (0, "w"), 0)


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def given(request):
    return Models(request.param)


@pytest.fixture(params=["fused", "plain"])
def loops(request):
    if request.param == "fused":
        yield
    else:
        with plain_loops():
            yield


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def light_fine_tune(*shape, seed=0):
    """A delta of bfloat16 weights: few magnitudes, many zeros."""
    base = (0.02 * normal(*shape, seed=seed)).bfloat16()
    return (base.float() + 1e-4 * normal(*shape, seed=seed + 1)).bfloat16().float() - base.float()


def ask(questions, state=None):
    """The answer, the way any runner gets it, and how many passes it took."""
    passes = 0
    while True:
        passes += 1
        folded = questions[0].partial(state)
        for question in questions[1:]:
            folded = questions[0].merge(folded, question.partial(state))
        said = questions[0].bare().finish(folded, state)
        if not isinstance(said, Again):
            return said, passes
        state = said.state


def how(name, weight, normalize, scaling):
    elect = "weighted" if name in ("breadcrumbs_ties", "della") else None
    return {"weight": weight, "elect": elect, "normalize": normalize, "scaling": scaling}


# --- breadcrumbs


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("weight", [WEIGHTS, SIGNED])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("density", "gamma"),
    [
        ([0.9, 0.5, 0.2], [0.01, 0.1, 0.3]),
        ([1.0, 0.95, 0.0], [0.2, 0.2, 0.2]),  # more outliers than may be dropped; nothing kept
        ([0.3, 1e-9, 0.5], [0.0, 0.5, 1.0]),
    ],
)
@pytest.mark.parametrize("rescale", [True, False])
def test_breadcrumbs(given, name, weight, normalize, density, gamma, rescale, loops):
    options = {"density": density, "gamma": gamma, "rescale": rescale}
    parameters = {"weight": weight, "normalize": normalize, "lambda": 0.7, **options}
    found = merge(name, given.models, given.base, parameters=parameters)
    expected = formulas.breadcrumbs(
        given.models64, given.base64, **options, **how(name, weight, normalize, 0.7)
    )
    assert_close(found, expected, 4 * np.abs(given.base64), *given.models64)


def test_breadcrumbs_drops_one_in_a_hundred_by_default():
    base, model = torch.zeros(1000), torch.arange(1000.0) + 1
    parameters = {"weight": [1.0], "density": [0.5]}
    found = merge("breadcrumbs", [model], base, parameters=parameters)
    assert torch.equal(found.nonzero().view(-1), torch.arange(490, 990))


def test_breadcrumbs_over_the_model(given, loops):
    """One band for each model: tensors of larger deltas hold its outliers."""
    loud = Models(given.base.dtype, shape=(90, 63), seed=20)
    loud.models = [loud.base + 3 * (m - loud.base) for m in loud.models]
    options = {"density": [0.5] * 3, "gamma": [0.1] * 3}
    node = apply(
        "breadcrumbs",
        [{"a": a, "b": b} for a, b in zip(given.models, loud.models, strict=True)],
        {"a": given.base, "b": loud.base},
        parameters={"weight": WEIGHTS, **options, "over": "model"},
    )
    found = merged(node)
    rows = len(given.base)
    base = np.concatenate([given.base64, loud.base64])
    pairs = zip(given.models64, map(float64, loud.models), strict=True)
    models = [np.concatenate(pair) for pair in pairs]
    expected = formulas.breadcrumbs(models, base, **options, **how("", WEIGHTS, False, 1.0))
    assert_close(found["a"], expected[:rows], *models)
    assert_close(found["b"], expected[rows:], *models)


@pytest.mark.parametrize(("keep", "skip"), [(0.9, 0.01), (0.4, 0.3), (0.0, 0.3), (0.5, 0.0)])
@pytest.mark.parametrize("pieces", [1, 7])
def test_a_band_holds_the_share_asked_for(keep, skip, pieces, loops):
    """Equals at either cut are drawn: exactly in expectation, here within five deviations."""
    x = light_fine_tune(60_000)
    cut, passes = ask([band(part, keep=keep, skip=skip) for part in x.tensor_split(pieces)])
    assert passes == 2
    magnitudes = x.abs().sort(descending=True).values
    outliers, kept = int(skip * len(x)), int(keep * len(x))
    for edge, rank in ((cut.upper, outliers), (cut.lower, outliers + kept)):
        assert edge.value == (magnitudes[rank - 1].item() if rank else math.inf)
    left = trim(x, cut.at(DRAW))
    assert torch.equal(left[left != 0], x[left != 0])
    assert left.abs().max() <= cut.upper.value
    zeros = int((x == 0).sum()) if cut.lower.value == 0 else 0
    equals = max(int((x.abs() == edge.value).sum()) for edge in (cut.upper, cut.lower))
    assert abs(int((left != 0).sum()) - kept) <= zeros + 5 * math.sqrt(equals / 2)


def test_where_both_cuts_are_one_magnitude_no_element_counts_twice(loops):
    x = torch.tensor([1.0, -1.0]).repeat(50_000)
    cut, _ = ask([band(x, keep=0.3, skip=0.2)])
    assert cut.lower.value == cut.upper.value == 1.0
    left = trim(x, cut.at(DRAW))
    assert abs(int((left != 0).sum()) - 30_000) < 5 * math.sqrt(1e5 * 0.3 * 0.7)
    outliers = keep_above(x, cut.upper.at(DRAW)) != 0
    assert not (outliers & (left != 0)).any()


def test_a_sample_saves_a_pass_and_changes_no_answer(loops):
    """Magnitudes of one power of two, so that a few buckets bracket a cut."""
    x = 1 + torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    question = band(x, keep=0.6, skip=0.1)
    begin = question.bracket(band(x[::16], keep=0.6, skip=0.1).partial(None))
    assert begin is not None
    assert None not in begin
    exact, twice = ask([question])
    assert (ask([question], begin), twice) == ((exact, 1), 2)
    misled = question.bracket(question.partial(None) * 0 + np.eye(1, 1 << 16, 5, dtype=np.int64)[0])
    assert ask([question], misled)[0] == exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ranks", "apart"),
    [((0.1, 0.12, 0.5, 0.51), True), ((0, 0.1, 0.1, 0.3), False), ((0.2, 0.6, 0.4, 0.9), False)],
)
def test_both_cuts_are_looked_for_in_one_pass(dtype, ranks, apart, loops):
    """What lies between their brackets' ends, counted by comparing each magnitude with these;
    brackets that touch are looked at one after the other."""
    base, model = ((0.02 * normal(71, 83, seed=s)).to(dtype) for s in (0, 1))
    model.view(-1)[::61], model[3, 4] = math.inf, math.nan
    model[5], model[6], base[6] = base[5], -0.0, 0.0
    magnitudes = (model.float() - base.float()).abs()
    bits = magnitudes[magnitudes.isfinite()].sort().values.view(torch.int32)
    ends = bits[[int(rank * (len(bits) - 1)) for rank in ranks]].tolist()
    states = Bracket(*ends[:2], listed=True), Bracket(*ends[2:], listed=True)
    question = band(Difference(model, base), keep=0.5, skip=0.1)
    fused = fused_for(question.x) is not None
    assert (question._inside_both(*states) is not None) == (fused and apart)
    for (low, high), inside in zip((ends[:2], ends[2:]), question.partial(states), strict=True):
        assert inside.counted == len(bits)
        assert inside.above == int((bits > high).sum())
        within = bits[(bits >= low) & (bits <= high)].numpy()
        assert sorted(np.concatenate(inside.found)) == within.tolist()


def test_samples_are_added_to_what_others_counted(loops):
    parts = [light_fine_tune(n, seed=n) for n in (5000, 300, 1)]
    counts = None
    for number, part in enumerate(parts):
        with shared() if number == 1 else nullcontext():
            counts = cutoff(part, keep=0.2).sampled(counts)
    leading = torch.cat(parts).abs().view(torch.int32) >> 15
    assert np.array_equal(counts, np.bincount(leading.numpy(), minlength=1 << 16))


def test_bands_fold_in_any_order():
    parts = [band(part, keep=0.5, skip=0.1) for part in light_fine_tune(30_000).tensor_split(9)]
    assert ask(parts) == ask(parts[::-1])
    assert parts[0].exact
    assert not parts[0].bare().x.numel()


@pytest.mark.parametrize("what", ["cut", "band"])
def test_the_fused_trim_equals_the_plain_one(what):
    x = light_fine_tune(100, 403)
    x[3, ::7], x[4, ::9], x[5, 3] = math.nan, math.inf, -math.inf
    for keep in (0.001, 0.3, 0.9, 1.0):
        asked = cutoff(x, keep=keep) if what == "cut" else band(x, keep=keep, skip=0.05)
        cut = ask([asked])[0].at(DRAW)
        plain = keep_band(x, cut) if isinstance(cut, BandCut) else keep_above(x, cut)
        assert torch.equal(trim(x, cut).nan_to_num(nan=7), plain.nan_to_num(nan=7))


# --- della


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize("rescale", [True, "density", False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("density", "epsilon"), [([0.5, 0.3, 0.8], [0.15, 0.29, 0.1]), ([0.0, 1.0, 0.5], [0.1] * 3)]
)
def test_della(given, name, rescale, normalize, density, epsilon, loops):
    options = {"density": density, "epsilon": epsilon, "rescale": rescale}
    parameters = {"weight": WEIGHTS, "normalize": normalize, "lambda": 0.6, **options}
    found = merge(name, given.models, given.base, seed=5, parameters=parameters)
    expected = formulas.della(
        given.models64, given.base64, seed=5, **options, **how(name, WEIGHTS, normalize, 0.6)
    )
    steps = [(m - given.base64) / 0.01 for m in given.models64]
    assert_close(found, expected, given.base64, *steps)


def test_chances_rise_by_rank_within_a_row():
    x = torch.tensor([[-4.0, 1.0, 2.0, 3.0, -5.0], [1.0, 1.0, -1.0, 0.0, 2.0]])
    found = chances(x, 0.5, 0.2)
    # Ranks 3 0 1 2 4; and of the equal ones the mean of 1, 2 and 3.
    expected = torch.tensor([[0.6, 0.3, 0.4, 0.5, 0.7], [0.5, 0.5, 0.5, 0.3, 0.7]]).double()
    assert torch.allclose(found, expected, rtol=0, atol=1e-7)
    assert torch.equal(chances(x.double(), 0.5, 0.2), found)


@pytest.mark.parametrize("x", [torch.ones(7, 1), torch.ones(()), torch.ones(4, 30)])
def test_rows_of_one_or_of_equals_are_kept_with_the_density(x):
    assert torch.equal(chances(x, 0.5, 0.3), torch.full_like(x, 0.5).double())
    assert chances(torch.ones(7, 1), 0.25, 0.125).shape == (7, 1)


def test_rows_of_one_merge(loops):
    """mergekit divides zero by zero there."""
    base, model = torch.zeros(100_000, 1), torch.ones(100_000, 1)
    parameters = {"weight": [1.0], "density": [0.3], "rescale": False}
    kept = merge("della_linear", [model], base, parameters=parameters).mean().item()
    assert abs(kept - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 1e5)


def test_della_keeps_by_the_chances():
    """Over many rows of the same magnitudes, how often each place was kept."""
    model = torch.arange(1.0, 9.0).repeat(50_000, 1)
    parameters = {"weight": [1.0], "density": [0.5], "epsilon": [0.4], "rescale": False}
    found = merge("della_linear", [model], torch.zeros_like(model), parameters=parameters)
    expected = 0.1 + 0.8 * torch.arange(8) / 7
    assert ((found != 0).float().mean(0) - expected).abs().max() < 5 * 0.5 / math.sqrt(50_000)


@pytest.mark.parametrize(
    "x",
    [
        normal(300, 403),
        light_fine_tune(300, 403),
        light_fine_tune(5, 5000),
        normal(40, 2000).exp().pow(20),  # from 1e-30 to 1e30: no cell tells them apart
        torch.cat([normal(8, 3000), torch.full((8, 1), 1e30)], dim=1),
        1 + 1e-7 * torch.randint(0, 9, (20, 3000), generator=torch.Generator().manual_seed(0)),
        torch.zeros(3, 200),
        torch.full((3, 200), 1e-45),
        normal(100, 1),
        normal(3000),
    ],
    ids=lambda x: "x".join(map(str, x.shape)),
)
def test_the_fused_ranks_equal_the_plain_ones(x):
    x = x.clone()
    for spoil in (None, math.nan, math.inf):
        if spoil is not None:
            x.view(-1)[5::97] = spoil
        for keep, epsilon in ((0.5, 0.15), (0.3, 0.29), (0.9, 0.0)):
            fused = keep_by_rank(x, keep, epsilon, DRAW, 1)
            with plain_loops():
                plain = keep_by_rank(x, keep, epsilon, DRAW, 1)
            assert torch.equal(fused.nan_to_num(nan=7), plain.nan_to_num(nan=7))


@settings(max_examples=50, deadline=None)
@drawn_from(width=st.integers(2, 6000), chance=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_what_a_cell_may_keep_is_within_what_is_looked_for(width, chance, seed):
    """Of the numbers drawn, multiples of 2^-24, every one below a cell's greatest chance."""
    rng = np.random.default_rng(seed)
    count = np.bincount((rng.exponential(100.0, width)).astype(int) % CELLS, minlength=CELLS)
    cells = count.astype(np.uint64) | np.uint64(0xFFFFFFFF << 32)
    sure, maybe = np.empty(CELLS, np.float32), np.empty(CELLS, np.float32)
    spread = 0.99 * min(chance, 1 - chance)
    apart = _cell_chances(cells, chance - spread, spread / (width - 1), sure, maybe)
    drawn = ((np.ceil(maybe.astype(float) * 2**24) - 1) / 2**24).astype(np.float32)
    at = (count > 0) & (drawn >= sure)
    assert (drawn[at] - sure[at] < apart).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(300, 70), (7, 3000), (1, 1), (2000,), (5, 1024)])
def test_what_is_left_to_the_loops_is_thinned_as_a_tensor_is(dtype, shape):
    base = (0.02 * normal(*shape)).to(dtype)
    model = (base.float() + 1e-3 * normal(*shape, seed=1)).to(dtype)
    model.view(-1)[::61] = math.inf
    delta = Difference(model, base)
    for sparsify in (
        lambda x: keep_at_random(x, 0.4, DRAW, 1),
        lambda x: keep_by_rank(x, 0.5, 0.2, DRAW, 1),
    ):
        found = sparsify(delta)
        assert isinstance(found, Thinned)
        with plain_loops():
            expected = sparsify(model.float() - base.float())
        assert_same(computed(found), expected)
        for size in (1, 1000, 1024, 5000):
            runs = [computed(x).view(-1) for x in runs_of(found, size)]
            assert_same(torch.cat(runs), expected.view(-1))


NEXT_TO_ALL = [math.nextafter(1.0, 0.0), 1 - 2.0**-25, 1 - 2.0**-24, 1 - 2.0**-23]


@pytest.mark.parametrize("keep", [0.0, 1e-45, 2.0**-24, 1.5 * 2.0**-24, 0.3, *NEXT_TO_ALL])
def test_marks_are_numbers_below_the_density(keep):
    """As torch compares them, at densities next to nothing and to everything as well."""
    base, model = torch.zeros(3000).bfloat16(), torch.ones(3000).bfloat16()
    found = computed(keep_at_random(Difference(model, base), keep, DRAW, 0))
    expected = DRAW.uniform(model, 0) < torch.tensor(keep, dtype=torch.float32)
    assert torch.equal(found != 0, expected)


def assert_same(found, expected):
    """To the bit, but for what kind of NaN it is."""
    assert torch.equal(found.isnan(), expected.isnan())
    bits = [x.nan_to_num(nan=7).view(torch.int32) for x in (found, expected)]
    assert torch.equal(*bits)


@pytest.mark.parametrize("size", [1, 700, 1024, 2500, 10**6])
def test_magnitudes_are_summed_piece_by_piece(size):
    base, model = (normal(71, 83, seed=seed).bfloat16() for seed in (0, 1))
    kept = keep_at_random(Difference(model, base), 0.5, DRAW, 0)
    expected = [x.double().abs().sum().item() for x in computed(kept).view(-1).split(size)]
    assert Norm(kept).partials(size) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("size", [1, 700, 1024, 2500, 10**6])
def test_norms_before_and_after_are_those_of_each(size, loops):
    base, model = (normal(71, 83, seed=seed).bfloat16() for seed in (0, 1))
    delta = Difference(model, base)
    kept = keep_at_random(delta, 0.5, DRAW, 0)
    found = np.array(Norms(delta, kept).partials(size))
    assert found.T.tolist() == [Norm(x).partials(size) for x in (delta, kept)]
    expected = [float(x.double().abs().sum()) for x in computed(delta).reshape(-1).split(size)]
    assert found[:, 0].tolist() == pytest.approx(expected, rel=1e-13)


def test_norms_leave_out_what_is_not_finite(loops):
    base, model = torch.ones(2000).bfloat16(), torch.full((2000,), 3.0).bfloat16()
    model[5], model[7] = math.inf, math.nan
    delta = Difference(model, base)
    kept = keep_at_random(delta, 0.5, DRAW, 0)
    left = computed(kept)
    found = Norms(delta, kept).partial(None)
    assert found.tolist() == [2.0 * 1998, 2.0 * int((left == 2.0).sum())]


@pytest.mark.parametrize("method", ["dare_ties", "della", "sce"])
def test_what_was_drawn_is_the_same_remembered_or_drawn_again(method):
    base = (0.02 * normal(120, 256)).bfloat16()
    models = [(base.float() + 1e-3 * normal(120, 256, seed=s)).bfloat16() for s in (1, 2)]
    parameters = {"weight": [1.0, 0.5], "density": [0.5, 0.3]}
    if method == "sce":
        parameters = {"select_topk": 0.3}
    node = apply(method, [{"w": m} for m in models], {"w": base}, parameters=parameters)
    given = [leaf["w"].reshape(-1) for leaf in align(node).tensors]

    def read(leaf, span):
        return given[leaf][span[0] : span[1]]

    with plain_loops():
        expected = merge(method, [m.float() for m in models], base.float(), parameters=parameters)
    found = []
    for room in (0, 2000, 10**6):  # for none of the blocks, for some, for all
        evaluation = Evaluation(programs(node)["w"], (120, 256), block=5000, remembered=room)
        settle([evaluation], [read], ComputePool(1))
        blocks = [evaluation.block(b, read) for b in range(len(evaluation.grid))]
        found.append(torch.cat(blocks).view(120, 256))
        torch.testing.assert_close(found[-1], expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_memory_holds_no_more_than_it_has_room_for():
    remembered = Remembered(100)
    small, large = np.zeros(60, np.uint8), np.zeros(60, np.uint8)
    assert remembered.once("a", lambda: small) is small
    assert remembered.once("b", lambda: large) is large
    assert remembered.once("a", lambda: large) is small
    assert remembered.once("b", lambda: small) is small  # had no room: it is made again


def test_rows_longer_than_a_block_are_seen_whole():
    model = normal(2, 2**18 + 5)
    parameters = {"weight": [1.0], "density": [0.5], "rescale": False}
    found = merge("della_linear", [model], torch.zeros_like(model), parameters=parameters)
    draws = Draw(0, (0, "w"), 0).uniform(model)
    assert torch.equal(found, model * (draws < chances(model, 0.5, 0.15).float()))


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.1), (0.5, 0.5)])
def test_chances_outside_of_0_to_1_are_refused_when_planned(density, epsilon):
    parameters = {"weight": [1.0], "density": [density], "epsilon": [epsilon]}
    given = Models(torch.float32, count=1)
    with pytest.raises(ParameterError, match="chances outside") as caught:
        merge("della", given.models, given.base, parameters=parameters)
    assert "epsilon: " in caught.value.fix


# --- SCE


@pytest.mark.parametrize("topk", [0.0, 1e-9, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_sce(dtype, count, topk, loops):
    given = Models(dtype, count)
    for i, model in enumerate(given.models):
        model += (i + 1) * 0.3 * (model - given.base)  # so that the weights differ
    given.models64 = [float64(m) for m in given.models]
    found = merge("sce", given.models, given.base, parameters={"select_topk": topk})
    expected = formulas.sce(given.models64, given.base64, select_topk=topk)
    assert_close(found, expected, *given.models64)


def test_sce_selects_a_share_of_what_varies(loops):
    """Equal entries don't count, and where none varies nothing is added."""
    base, step = torch.zeros(1000), torch.ones(1000)
    other = step.clone()
    other[:100] += torch.arange(1.0, 101.0)
    found = merge("sce", [step, other], base, parameters={"select_topk": 0.3})
    assert torch.equal(found.nonzero().view(-1), torch.arange(70, 100))
    found = merge("sce", [step, step.clone()], base, parameters={"select_topk": 0.3})
    assert torch.equal(found, base)


def test_sce_weighs_next_to_nothing_equally():
    tiny = 1e-4 * torch.ones(10)
    found = merge("sce", [tiny, 3 * tiny], torch.zeros(10))
    assert torch.allclose(found, 2 * tiny)
    found = merge("sce", [1e4 * tiny, 3e4 * tiny], torch.zeros(10))
    assert torch.allclose(found, torch.full((10,), 2.8)), "1 and 3 with weights 0.1 and 0.9"


def test_spread_is_the_variance_and_zero_for_equals(loops):
    xs = [normal(50, 63, seed=i) for i in range(5)]
    expected = np.var([float64(x) for x in xs], axis=0) * 5
    assert np.abs(float64(computed(spread(xs))) - expected).max() < 1e-5
    assert not computed(spread([xs[0]] * 5)).any()
    assert not computed(spread(xs[:1])).any()


def test_the_fused_spread_equals_the_plain_one():
    xs = [normal(50, 63, seed=i) for i in range(5)]
    fused = computed(spread(xs))
    with plain_loops():
        assert torch.equal(computed(spread(xs)), fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("shape", [(300, 70), (1, 1), (5, 1024), (4099,)])
def test_what_sce_leaves_to_the_loops_is_what_torch_makes_of_it(dtype, count, shape):
    """Variances, those selected of them, and with them the entries: to the bit, not finite ones
    and equals at the cut among them."""
    base = (0.02 * normal(*shape)).to(dtype)
    models = [(base.float() + 1e-3 * normal(*shape, seed=i)).to(dtype) for i in range(count)]
    models[-1].view(-1)[::61] = math.inf
    models[0].view(-1)[::7] = base.view(-1)[::7]
    deltas = [Difference(model, base) for model in models]
    varies = spread(deltas)
    assert isinstance(varies, Spread)
    tensors = [model.float() - base.float() for model in models]
    with plain_loops():
        plain = spread(tensors)
    assert_same(computed(varies), plain)
    magnitudes = plain.abs().view(-1)
    for at, share in ((0, 0.0), (len(magnitudes) // 2, 0.4), (len(magnitudes) - 1, 1.0)):
        cut = Cut(magnitudes.nan_to_num(posinf=0).sort().values[at].item(), share, DRAW)
        found = selected(deltas, varies, cut, DRAW)
        assert all(isinstance(one, Thinned) for one in found)
        with plain_loops():
            expected = selected(tensors, plain, cut, DRAW)
        shared = selected(tensors, spread(tensors), cut, DRAW)  # made already: others need them too
        for one, both, other in zip(found, shared, expected, strict=True):
            assert_same(computed(one), other)
            assert_same(both, other)
            if count == 1 and shape != (1, 1):
                assert not other.isfinite().all(), "what isn't finite stays so"


def test_cutoff_of_what_is_not_zero(loops):
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.zeros(500_000), 1 + torch.rand(200_000, generator=generator)])
    parts = [cutoff(part, keep=0.25, nonzero=True) for part in x.tensor_split(3)]
    cut, _ = ask(parts)
    assert int((x >= cut.value).sum()) == 50_000
    begin = parts[0].bracket(cutoff(x[::8], keep=0.25, nonzero=True).partial(None))
    assert begin is not None
    assert ask(parts, begin) == (cut, 1)


def test_mean_square(loops):
    parts = normal(1000).tensor_split(3)
    for of in (lambda x: x, lambda x: Difference(x, torch.zeros_like(x))):
        found, _ = ask([mean_square(of(part)) for part in parts])
        assert abs(found - normal(1000).double().square().mean().item()) < 1e-12
    assert ask([mean_square(torch.empty(0))])[0] == 0.0


# --- TIES


@pytest.mark.parametrize(
    ("deltas", "weight", "expected"),
    [
        ([2.0, -3.0], [2.0, 1.0], -3.0),  # weights don't vote
        ([2.0, -1.0, -2.0], [1.0, 1.0, 1.0], -1.5),
        ([2.0, 3.0], [3.0, 1.0], 2.25),  # they weigh
        ([2.0, -3.0], [1.0, 0.0], 2.0),  # what has no weight has no vote
    ],
)
def test_signs_elected_as_in_the_paper(deltas, weight, expected, loops):
    models = [torch.tensor([d]) for d in deltas]
    parameters = {"weight": weight, "sign_weighting": "paper"}
    assert merge("ties", models, torch.zeros(1), parameters=parameters).item() == expected


@pytest.mark.parametrize("name", ["ties", "breadcrumbs_ties", "dare_ties", "della"])
def test_who_elects_signs(given, name, loops):
    """With nothing dropped, the four that elect signs are one."""
    for by in ("weighted", "paper"):
        parameters = {"weight": SIGNED, "normalize": True, "sign_weighting": by}
        found = merge(name, given.models, given.base, parameters=parameters)
        deltas = [m - given.base64 for m in given.models64]
        total = formulas.elect_and_merge(deltas, SIGNED, normalize=True, by=by)
        scale = 4 * np.abs(given.base64)  # weights that nearly cancel
        assert_close(found, given.base64 + total, scale, *given.models64)


def test_ties_restores_the_norm(given):
    parameters = {"weight": [1.0], "density": [0.3], "rescale": True}
    found = merge("ties", given.models[:1], given.base, parameters=parameters)
    before = np.abs(given.models64[0] - given.base64).sum()
    after = np.abs(float64(found) - given.base64).sum()
    assert abs(after / before - 1) < 1e-5


# --- bfloat16


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("della", {"weight": WEIGHTS, "density": [0.5] * 3, "epsilon": [0.1] * 3}),
        ("sce", {"select_topk": 1.0}),
        ("breadcrumbs", {"weight": WEIGHTS, "density": [1.0] * 3, "gamma": [0.1] * 3}),
    ],
)
def test_bfloat16_is_within_one_unit_of_the_reference(name, parameters):
    given = Models(torch.float32)
    base, models = given.base.bfloat16(), [m.bfloat16() for m in given.models]
    found = merge(name, models, base, seed=5, parameters=parameters)
    options = {k: v for k, v in parameters.items() if k != "weight"}
    if name != "sce":
        options |= how(name, WEIGHTS, name == "della", 1.0)
    if name == "della":
        options |= {"rescale": True, "seed": 5}
    formula = getattr(formulas, name)
    expected = torch.from_numpy(formula([float64(m) for m in models], float64(base), **options))
    step = 2.0 ** (torch.floor(torch.log2(expected.abs())) - 7)
    assert ((found.double() - expected).abs() <= step).double().mean() >= 0.999


def test_programs_of_della_say_what_is_wrong_with_the_chances():
    tensors = {"w": torch.zeros(4, 4)}
    node = apply("della", [tensors], tensors, parameters={"weight": [1.0], "density": [0.05]})
    program = programs(node)["w"]
    with pytest.raises(ParameterError, match="chances outside"):
        program.steps[-1].sees((4, 4))


@pytest.mark.parametrize("levels", [3, 9, 40, 4000], ids=lambda n: f"{n} magnitudes")
@pytest.mark.parametrize("shares", [(0.4, 0.0), (0.0, 0.7), (0.3, 0.6), (0.0, 0.0)], ids=str)
def test_equals_at_a_cut_are_drawn_alike_however_many_there_are(levels, shares):
    """Where they are many the loops draw a number for every element, else only for these."""
    drawn = torch.randint(-levels, levels + 1, (5_003,), generator=torch.Generator().manual_seed(0))
    x = drawn.float() / 8
    x[7], x[1500], x[3001] = math.inf, math.nan, -0.0
    draw = Draw(5, (0, "w"), 11)
    low, high = Cut(levels // 3 / 8, shares[0], draw), Cut((levels - 1) / 8, shares[1], draw)
    for cut in (low, BandCut(low, high)):
        fused = trim(x, cut)
        with plain_loops():
            plain = trim(x, cut)
        assert torch.equal(fused.nan_to_num(7e7, 8e8), plain.nan_to_num(7e7, 8e8))
        above = x.abs() > low.value
        picked = (x.abs() == low.value) & (draw.uniform(x) < low.share)
        within = x.abs() < high.value  # where the band's upper edge is far
        assert torch.equal(fused[within], torch.where(above | picked, x, 0.0)[within])
