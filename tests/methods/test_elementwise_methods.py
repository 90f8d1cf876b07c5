"""nearswap, arcee_fusion, ram, ramplus_tl, passthrough; the quantiles that arcee_fusion needs."""

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from methods import formulas
from methods.formulas import float64
from methods.inputs import DTYPES, Models, assert_close, random, share_off_by_more_than_a_unit
from methods.trees import apply, merge, merged

import distmerge
from distmerge.errors import ParameterError, RecipeError
from distmerge.methods.quantile import quantiles
from distmerge.methods.reductions import Again


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request):
    return request.param


def sparse(dtype, count=3, shape=(150, 63)):
    """Fine-tunes that change three entries in ten each."""
    made = Models(dtype, count, shape)
    for i, model in enumerate(made.models):
        model[random(*shape, seed=50 + i) < 0.5] = 0.0
        model += (model == 0).to(dtype) * made.base
    made.models64 = [float64(m) for m in made.models]
    return made


# --- nearswap


@pytest.mark.parametrize("t", [0.0, 1e-7, 0.01, 0.1, 5.0])
def test_nearswap(dtype, t):
    made = Models(dtype, 1)
    found = merge("nearswap", made.models, made.base, parameters={"t": t})
    assert_close(found, formulas.nearswap(made.models64[0], made.base64, t=t), *made.models64)


def test_nearswap_goes_no_further_than_t():
    base, other = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 1.05, 3.0, -1.0])
    found = merge("nearswap", [other], base, parameters={"t": 0.125})
    assert found.tolist() == pytest.approx([1.0, 1.05, 1.125, 0.875])
    assert found[1] == other[1], "what is near is taken over exactly"


# --- arcee_fusion


@pytest.mark.parametrize(("scale", "allowed"), [(0.01, 1e-3), (0.1, 1e-4), (2.0, 1e-4)])
@pytest.mark.parametrize("shape", [(150, 63), (5000, 63), (63,), (4, 6, 63), (9, 1)], ids=str)
def test_arcee_fusion(dtype, scale, allowed, shape):
    made = Models(dtype, 1, shape, scale=scale)
    found = merge("arcee_fusion", made.models, made.base)
    expected = formulas.arcee_fusion(made.models64[0], made.base64)
    # A divergence is a small sum of large terms: in float32 some next to the cut fall elsewhere.
    off = np.abs(float64(found) - expected) > 1e-6 * np.abs(expected).max()
    assert off.mean() <= (allowed if dtype == torch.float32 else 0.0)
    assert found.dtype == dtype


def test_arcee_fusion_takes_what_stands_out():
    made = Models(torch.float32, 1)
    found = merge("arcee_fusion", made.models, made.base)
    taken = found != made.base
    assert 0.0 < taken.double().mean() < 0.3
    assert torch.allclose(found[taken], made.models[0][taken])
    scores = formulas.importance(made.models64[0], made.base64)
    assert scores[taken.numpy()].min() > 0.999 * scores[~taken.numpy()].max()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8])
def test_arcee_fusion_of_few_elements(count):
    """The quartiles are elements, the lower of two neighbours: no interpolation."""
    made = Models(torch.float64, 1, (count,))
    found = merge("arcee_fusion", made.models, made.base)
    assert_close(found, formulas.arcee_fusion(made.models64[0], made.base64), *made.models64)


def test_arcee_fusion_keeps_the_dtype():
    made = Models(torch.bfloat16, 1)
    found = merge("arcee_fusion", made.models, made.base)
    assert found.dtype == torch.bfloat16
    expected = formulas.arcee_fusion(made.models64[0], made.base64)
    assert share_off_by_more_than_a_unit(found, expected) <= 0.001


# --- quantiles

HARD = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.0000001, 3e38, -3e38]
NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


def ask(blocks, shares):
    """Let every block answer until the question is settled."""
    state, rounds = None, 0
    while True:
        questions = [quantiles(block, shares) for block in blocks]
        total = questions[0].partial(state)
        for question in questions[1:]:
            total = questions[0].merge(total, question.partial(state))
        outcome, rounds = questions[0].bare().finish(total, state), rounds + 1
        if not isinstance(outcome, Again):
            return outcome, rounds
        state = outcome.state


@drawn(
    st.lists(st.sampled_from(HARD + NOT_FINITE) | st.floats(-1e3, 1e3, width=32), max_size=40),
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
    st.integers(1, 5),
    st.sampled_from(DTYPES),
)
@settings(max_examples=80, deadline=None)
def test_quantiles_are_elements_of_the_sorted_tensor(values, shares, pieces, dtype):
    x = torch.tensor(values, dtype=dtype)
    ordered = np.sort([v for v in x.tolist() if np.isfinite(v)])
    found, rounds = ask(torch.tensor_split(x, pieces), shares)
    if not len(ordered):
        assert found == (0.0,) * len(shares)
        return
    assert found == tuple(ordered[int(share * (len(ordered) - 1))] for share in shares)
    assert rounds == {torch.float32: 2, torch.float64: 4}[dtype]


def test_quantiles_of_many_elements(dtype):
    x = random(300_000, seed=3, dtype=dtype, scale=1e-3)
    found, _ = ask(x.split(70_000), [0.0, 0.25, 0.5, 0.75, 1.0])
    ordered = x.sort().values
    assert found == tuple(ordered[[0, 74999, 149999, 224999, 299999]].tolist())


# --- ram


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.1])
def test_ram(dtype, count, epsilon):
    made = sparse(dtype, count)
    found = merge("ram", made.models, made.base, parameters={"epsilon": epsilon})
    expected = formulas.ram(made.models64, made.base64, epsilon=epsilon)
    assert_close(found, expected, *made.models64)


@pytest.mark.parametrize("options", [{}, {"r": 0.5, "alpha": 3.0}, {"r": -0.3, "epsilon": 0.1}])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_ramplus(dtype, count, options):
    made = sparse(dtype, count)
    found = merge("ramplus_tl", made.models, made.base, parameters=options)
    expected = formulas.ramplus_tl(made.models64, made.base64, **options)
    assert_close(found, expected, *made.models64)


def test_ram_by_hand():
    base = torch.zeros(5)
    models = [torch.tensor([4.0, 4.0, 0.0, 0.0, 1e-6]), torch.tensor([0.0, 2.0, 8.0, 0.0, 2e-6])]
    assert merge("ram", models, base).tolist() == [4.0, 3.0, 8.0, 0.0, 0.0]
    parameters = {"r": 1.0, "alpha": 0.5}  # each shares one entry and has one: 1 + min(1, 0.5)
    found = merge("ramplus_tl", models, base, parameters=parameters)
    assert found.tolist() == [6.0, 3.0, 12.0, 0.0, 0.0]


def test_ramplus_without_unique_entries():
    base, model = random(63, seed=1), random(63, seed=2)
    found = merge("ramplus_tl", [model, model], base, parameters={"epsilon": 0.0})
    assert torch.allclose(found, model, atol=1e-6)


def test_ramplus_over_the_model():
    """One ratio from all tensors together; per tensor it would differ."""
    some, all_ = sparse(torch.float32), Models(torch.float32, shape=(40, 63), seed=20)
    node = apply(
        "ramplus_tl",
        [{"a": a, "b": b} for a, b in zip(some.models, all_.models, strict=True)],
        {"a": some.base, "b": all_.base},
        parameters={"over": "model", "r": 1.0, "alpha": 5.0},
    )
    shared, unique = np.zeros(3), np.zeros(3)
    for made in (some, all_):
        changed = np.stack([np.abs(m - made.base64) > 1e-5 for m in made.models64])
        count = changed.sum(axis=0)
        shared += [c[count > 1].sum() for c in changed]
        unique += [c[count == 1].sum() for c in changed]
    found = merged(node)
    for key, made in (("a", some), ("b", all_)):
        options = {"r": 1.0, "alpha": 5.0}
        expected = formulas.ramplus_tl(
            made.models64, made.base64, **options, ratios=shared / unique
        )
        assert_close(found[key], expected, *made.models64)
    own = formulas.ramplus_tl(some.models64, some.base64, **options)
    assert np.abs(own - float64(found["a"])).max() > 1e-2, "the scope matters to this data"


# --- passthrough


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32, torch.float64]
)
def test_passthrough_is_the_input_bit_by_bit(dtype):
    """Every value that the dtype has, or many."""
    size = dtype.itemsize
    if size <= 2:
        kind = {1: torch.uint8, 2: torch.int16}[size]
        bits = torch.arange(1 << (8 * size), dtype=torch.int32).to(kind)
    else:
        kind = {4: torch.int32, 8: torch.int64}[size]
        bits = (random(5000, seed=1, dtype=torch.float64) * 1e9).to(kind) * 12345
    x = bits.view(dtype)
    x = x[x.double().isfinite()]
    assert torch.equal(merge("passthrough", [x]).view(kind), x.view(kind))


def test_passthrough_copies_what_is_no_float():
    x = {"ids": torch.arange(5), "w": torch.ones(3), "mask": torch.tensor([True, False])}
    found = merge("passthrough", [x])
    assert all(torch.equal(found[k], x[k]) and found[k].dtype == x[k].dtype for k in x)


@pytest.mark.parametrize("scale", [0.5, -1.0, 0.0, 1.0])
def test_passthrough_scales(dtype, scale):
    x = random(63, seed=1, dtype=dtype)
    found = merge("passthrough", [x], parameters={"scale": scale})
    assert_close(found, formulas.passthrough(float64(x), scale))


# --- how many models, and calls


@pytest.mark.parametrize(
    ("name", "count", "with_base", "parameters", "message"),
    [
        ("nearswap", 2, True, {"t": 0.1}, "nearswap merges 1 model besides its base, not 2"),
        ("arcee_fusion", 2, True, {}, "arcee_fusion merges 1 model besides its base, not 2"),
        ("arcee_fusion", 1, False, {}, "arcee_fusion needs a base"),
        ("ram", 1, False, {}, "ram needs a base"),
        ("passthrough", 2, False, {}, "passthrough merges 1 model, not 2"),
    ],
)
def test_wrong_numbers_of_models(name, count, with_base, parameters, message):
    base = torch.zeros(2) if with_base else None
    with pytest.raises(RecipeError, match=message):
        merge(name, [torch.ones(2)] * count, base, parameters=parameters)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("nearswap", {"t": -0.1}),
        ("ram", {"epsilon": -1.0}),
        ("ramplus_tl", {"alpha": -0.1}),
        ("karcher", {"max_iter": -1}),
        ("karcher", {"tol": -1e-5}),
        ("multislerp", {"weight": 1.0, "eps": -1.0}),
    ],
)
def test_parameters_out_of_range(name, parameters):
    base = None if name in ("karcher", "multislerp") else torch.zeros(2)
    with pytest.raises(ParameterError, match=f"{name}: {list(parameters)[-1]} can't be"):
        merge(name, [torch.ones(2)], base, parameters=parameters)


def test_calls():
    """The base is the first model; mergecraft's `weights=` where there are weights."""
    base, one, two = ({"w": random(20, 10, seed=i)} for i in range(3))
    tensors = [m["w"] for m in (base, one, two)]
    call = distmerge.find_method
    found = {
        "nearswap": call("nearswap")([base, one], t=0.1),
        "nuslerp": call("nuslerp")([base, one, two], weights=[0.2, 0.6]),
        "multislerp": call("multislerp")([base, one, two]),
        "karcher": call("karcher")([base, one, two], max_iter=30),
    }
    expected = {
        "nearswap": merge("nearswap", tensors[1:2], tensors[0], parameters={"t": 0.1}),
        "nuslerp": merge("nuslerp", tensors[1:], tensors[0], parameters={"weight": [0.2, 0.6]}),
        "multislerp": merge("multislerp", tensors[1:], tensors[0], parameters={"weight": 1.0}),
        "karcher": merge("karcher", tensors, parameters={"max_iter": 30}),
    }
    assert {k: torch.equal(v["w"], expected[k]) for k, v in found.items()} == dict.fromkeys(
        expected, True
    )
    alone = call("nuslerp")([one, two], base_index=None)
    assert torch.equal(alone["w"], merge("nuslerp", tensors[1:], parameters={"weight": [1, 1]}))
