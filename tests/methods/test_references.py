"""Every method against its formula in float64 numpy: `formulas`, straight from the papers.

Signs and thresholds are decisions, which rounding must not tip: the inputs are random, so that no
two magnitudes and no vote are that close.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from methods import formulas
from methods.formulas import float64
from methods.inputs import DTYPES, SHAPE, Models, assert_close, random
from methods.trees import apply, merge, merged, plain_loops

from distmerge.methods.registry import find_method, method_names

WEIGHTS = [0.7, 0.2, 0.45]
SIGNED = [0.9, -0.4, 0.3]
SAME_FORMULA = {
    **{"dare_linear": "dare", "dare_ties": "dare", "della_linear": "della"},
    "breadcrumbs_ties": "breadcrumbs",
}


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(params=["fused", "plain"])
def loops(request):
    if request.param == "fused":
        yield
    else:
        with plain_loops():
            yield


@pytest.fixture
def given(dtype):
    return Models(dtype)


# --- weighted sums


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weight", [WEIGHTS, SIGNED, [1.0, 1.0, 1.0]])
def test_linear(given, weight, normalize):
    found = merge("linear", given.models, parameters={"weight": weight, "normalize": normalize})
    expected = formulas.linear(given.models64, weight=weight, normalize=normalize)
    assert_close(found, expected, *given.models64)


def test_linear_normalizes_by_default(given):
    found = merge("linear", given.models, parameters={"weight": [2.0, 2.0, 2.0]})
    assert_close(found, np.mean(given.models64, axis=0), *given.models64)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp(dtype, t, loops):
    a, b = random(*SHAPE, seed=1, dtype=dtype), random(*SHAPE, seed=2, dtype=dtype, scale=3.0)
    expected = formulas.slerp(float64(a), float64(b), t)
    assert_close(merge("slerp", [b], a, parameters={"t": t}), expected, float64(b))
    assert_close(merge("slerp", [a, b], parameters={"t": t}), expected, float64(b))


@pytest.mark.parametrize("cosine", [1.0, 0.9996, 0.9994, 0.5, 0.0, -0.5, -0.9994, -0.9996, -1.0])
def test_slerp_by_angle(dtype, cosine):
    """From 0.9995 on a straight line, as in the paper's limit, on both ends of the half circle."""
    x, y = random(2000, seed=1, dtype=torch.float64), random(2000, seed=2, dtype=torch.float64)
    y = y - x * (x @ y) / (x @ x)
    b = cosine * x / x.norm() + (1 - cosine**2) ** 0.5 * y / y.norm()
    a, b = (x / x.norm()).to(dtype), (2 * b).to(dtype)
    expected = formulas.slerp(float64(a), float64(b), 0.3)
    found = merge("slerp", [b], a, parameters={"t": 0.3})
    # Near a half circle sin(angle) divides what is left of two opposite vectors.
    opposite = 1 / np.sqrt(1 - 0.9995**2)
    assert_close(found, expected, opposite * float64(a), opposite * float64(b))
    if abs(cosine) > 0.9995:
        assert_close(found, 0.7 * float64(a) + 0.3 * float64(b), float64(b))
    elif cosine > 0:
        sphere = np.linalg.norm(formulas.slerp(float64(a), float64(b) / 2, 0.3))
        assert abs(sphere - 1.0) < 1e-5, "the formula itself stays on the sphere"


def test_slerp_with_a_zero_vector(dtype):
    """A zero vector has no direction: it counts as orthogonal."""
    a, zero = random(50, seed=1, dtype=dtype), torch.zeros(50, dtype=dtype)
    assert_close(merge("slerp", [zero], a, parameters={"t": 0.5}), float64(a) * np.sqrt(0.5))


def test_model_stock(given, loops):
    expected = formulas.model_stock(given.models64, given.base64)
    assert_close(merge("model_stock", given.models, given.base), expected, given.base64)
    ratio = formulas.stock_ratio([(m - given.base64).ravel() for m in given.models64])
    assert abs(ratio) < 0.2, "independent steps: little of them is kept"


@pytest.mark.parametrize(("shared", "least"), [(0.9, 0.85), (0.5, 0.4)])
def test_model_stock_keeps_what_the_models_share(dtype, shared, least):
    base, step = random(63, 50, seed=1, dtype=dtype), random(63, 50, seed=2, dtype=dtype)
    own = [random(63, 50, seed=i, dtype=dtype) for i in (3, 4)]
    models = [base + shared**0.5 * step + (1 - shared) ** 0.5 * x for x in own]
    models64 = [float64(m) for m in models]
    expected = formulas.model_stock(models64, float64(base))
    assert_close(merge("model_stock", models, base), expected, *models64)
    assert formulas.stock_ratio([(m - float64(base)).ravel() for m in models64]) > least


def test_model_stock_over_the_model(dtype, loops):
    """One cosine of all tensors together; per tensor it would differ."""
    small, large = Models(dtype, seed=1), Models(dtype, shape=(400, 63), seed=20)
    large.models = [m + 0.1 * large.models[0] for m in large.models]
    large.models64 = [float64(m) for m in large.models]
    offsets = [
        np.concatenate([(m - x.base64).ravel() for x, m in ((small, a), (large, b))])
        for a, b in zip(small.models64, large.models64, strict=True)
    ]
    node = apply(
        "model_stock",
        [{"a": a, "b": b} for a, b in zip(small.models, large.models, strict=True)],
        {"a": small.base, "b": large.base},
        parameters={"over": "model"},
    )
    found, ratio = merged(node), formulas.stock_ratio(offsets)
    for key, one in (("a", small), ("b", large)):
        expected = formulas.model_stock(one.models64, one.base64, ratio=ratio)
        assert_close(found[key], expected, *one.models64)
        own = formulas.model_stock(one.models64, one.base64)
        assert np.abs(own - expected).max() > 1e-3, "the scope matters to this data"


def test_model_stock_of_opposite_steps(dtype):
    """Two offsets of cosine -1: the denominator is zero, and the base remains."""
    base, step = random(63, seed=1, dtype=dtype), torch.ones(63, dtype=dtype)
    assert torch.equal(merge("model_stock", [base + step, base - step], base), base)


# --- task vectors


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weight", [WEIGHTS, SIGNED])
@pytest.mark.parametrize("scaling", [1.0, -0.5, 2.0])
def test_task_arithmetic(given, weight, normalize, scaling):
    parameters = {"weight": weight, "normalize": normalize, "lambda": scaling}
    expected = formulas.task_arithmetic(
        given.models64, given.base64, weight=weight, normalize=normalize, scaling=scaling
    )
    assert_close(
        merge("task_arithmetic", given.models, given.base, parameters=parameters),
        expected,
        *given.models64,
    )


def test_weights_that_cancel_are_not_normalized(given):
    parameters = {"weight": [0.5, -0.5, 0.0], "normalize": True}
    expected = formulas.task_arithmetic(given.models64, given.base64, weight=parameters["weight"])
    found = merge("task_arithmetic", given.models, given.base, parameters=parameters)
    assert_close(found, expected, *given.models64)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weight", [WEIGHTS, SIGNED])
@pytest.mark.parametrize("density", [[0.0] * 3, [1.0] * 3, [0.2] * 3, [0.9, 0.01, 0.5], [1e-9] * 3])
def test_ties(given, weight, density, normalize, loops):
    parameters = {"weight": weight, "density": density, "normalize": normalize, "lambda": 0.7}
    expected = formulas.ties(
        given.models64,
        given.base64,
        weight=weight,
        density=density,
        normalize=normalize,
        scaling=0.7,
    )
    found = merge("ties", given.models, given.base, parameters=parameters)
    scale = 4 * np.abs(given.base64)  # |w| / |sum of w| of weights that nearly cancel
    assert_close(found, expected, scale, *given.models64)
    changed = (found != given.base).float().mean().item()
    if max(density) <= 0.2:
        assert changed <= sum(density) + 3 / found.numel(), "no more than was asked for is kept"


def test_ties_over_the_model(dtype, loops):
    """The paper's trim: one threshold a model, over all its tensors."""
    quiet, loud = Models(dtype, seed=1), Models(dtype, shape=(90, 63), seed=20)
    loud.models = [loud.base + 3 * (m - loud.base) for m in loud.models]
    loud.models64 = [float64(m) for m in loud.models]
    density = [0.2, 0.1, 0.5]
    node = apply(
        "ties",
        [{"a": a, "b": b} for a, b in zip(quiet.models, loud.models, strict=True)],
        {"a": quiet.base, "b": loud.base},
        parameters={"weight": WEIGHTS, "density": density, "over": "model"},
    )
    found = merged(node)
    deltas = {
        key: [m - one.base64 for m in one.models64] for key, one in (("a", quiet), ("b", loud))
    }
    together = [np.concatenate([d[i].ravel() for d in deltas.values()]) for i in range(3)]
    cuts = [formulas.cut(np.abs(x), d) for x, d in zip(together, density, strict=True)]
    for key, one in (("a", quiet), ("b", loud)):
        trimmed = [np.where(np.abs(d) >= c, d, 0) for d, c in zip(deltas[key], cuts, strict=True)]
        options = {"weight": WEIGHTS, "density": density}
        expected = formulas.ties(one.models64, one.base64, **options, trimmed=trimmed)
        # Thresholds are compared as float32 over a model: an element that equals one may differ.
        assert_close(found[key], expected, *one.models64)
        own = formulas.ties(one.models64, one.base64, **options)
        assert np.abs(own - expected).max() > 1e-2, "the scope matters to this data"


@pytest.mark.parametrize(
    ("deltas", "weight", "expected"),
    [
        ([1.0, -1.0], [1.0, 1.0], 1.0),  # a sum of zero is positive
        ([-1.0, 1.0], [1.0, 1.0], 1.0),
        ([2.0, -3.0], [1.0, 1.0], -3.0),
        ([2.0, -3.0], [2.0, 1.0], 2.0),  # weights vote
        # A negative weight turns a vote: -2 and -3 agree, and weights that cancel don't divide.
        ([2.0, -3.0], [-1.0, 1.0], -5.0),
        ([2.0, 0.0], [1.0, 1.0], 2.0),  # zeros don't dilute
        ([0.0, 0.0], [1.0, 1.0], 0.0),
        ([-4.0, 3.0], [0.5, 0.5], -4.0),
    ],
)
def test_sign_election(deltas, weight, expected, loops):
    """By hand, divided by the sum of the weights that agreed."""
    models = [torch.tensor([d]) for d in deltas]
    parameters = {"weight": weight, "density": [1.0, 1.0]}
    assert merge("ties", models, torch.zeros(1), parameters=parameters).item() == expected


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [True, "l1", "density", False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("density", [[0.5, 0.1, 0.9], [0.0, 1.0, 0.3]])
def test_dare(given, method, rescale, normalize, density, loops):
    parameters = {
        "weight": WEIGHTS,
        "density": density,
        "rescale": rescale,
        "normalize": normalize,
        "lambda": 0.6,
    }
    masks = [formulas.dare_mask(SHAPE, d, seed=5, key="w", model=i) for i, d in enumerate(density)]
    expected = formulas.dare(
        given.models64,
        given.base64,
        masks,
        weight=WEIGHTS,
        density=density,
        elect=method == "dare_ties",
        normalize=normalize,
        rescale=True if rescale == "l1" else rescale,
        scaling=0.6,
    )
    found = merge(method, given.models, given.base, seed=5, parameters=parameters)
    steps = [(m - given.base64) / max(d, 0.1) for m, d in zip(given.models64, density, strict=True)]
    assert_close(found, expected, given.base64, *steps)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_share_and_the_expectation(method):
    """Rescaled by the density, the mean over many elements is that of the whole task vector."""
    base, model = torch.zeros(400, 400), torch.ones(400, 400)
    parameters = {"weight": [1.0], "density": [0.25], "rescale": "density"}
    found = merge(method, [model], base, parameters=parameters)
    kept = (found != 0).double().mean().item()
    assert abs(kept - 0.25) < 5 * (0.25 * 0.75 / base.numel()) ** 0.5
    assert found[found != 0].unique().tolist() == [4.0]


def test_dare_rescales_by_default_to_the_l1_norm(given):
    parameters = {"weight": [1.0], "density": [0.3]}
    for method in ("dare_linear", "dare_ties"):
        found = merge(method, given.models[:1], given.base, parameters=parameters)
        before = np.abs(given.models64[0] - given.base64).sum()
        after = np.abs(float64(found) - given.base64).sum()
        assert abs(after / before - 1) < 1e-5


# --- examples and Fisher


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_median(dtype, count):
    given = Models(dtype, count)
    found = merge("median", given.models)
    assert np.array_equal(float64(found), formulas.median(given.models64))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_max_magnitude(dtype, count):
    given = Models(dtype, count)
    found = merge("max_magnitude", given.models, given.base)
    assert_close(found, formulas.max_magnitude(given.models64, given.base64), *given.models64)


def test_fisher(given, dtype):
    fishers = [random(*SHAPE, seed=30 + i, dtype=dtype).square() for i in range(3)]
    fishers[0][:10] = fishers[1][:10] = fishers[2][:10] = 0.0
    fishers[0][10:20] = 1e-12
    found = merge("fisher", given.models, fishers=fishers)
    expected = formulas.fisher(given.models64, [float64(f) for f in fishers])
    assert_close(found, expected, *given.models64)
    assert_close(found[:10], np.mean(given.models64, axis=0)[:10], *given.models64)


def test_fisher_threshold(dtype):
    models = [torch.tensor([1.0, 1.0], dtype=dtype), torch.tensor([3.0, 3.0], dtype=dtype)]
    fishers = [torch.tensor([1e-3, 0.75], dtype=dtype), torch.tensor([1e-4, 0.25], dtype=dtype)]
    found = merge("fisher", models, fishers=fishers, parameters={"eps": 0.01})
    assert found.tolist() == [2.0, 1.5]


# --- nothing is left out


@pytest.mark.parametrize("name", [n for n in method_names() if find_method(n).builtin])
def test_every_builtin_method_has_a_formula(name):
    formula = SAME_FORMULA.get(name, name)
    assert callable(getattr(formulas, formula))
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    compared = [text for text in texts if f'"{name}"' in text and f"formulas.{formula}" in text]
    assert compared or f'"{name}"' in Path(__file__).read_text(), "and is compared with it"
