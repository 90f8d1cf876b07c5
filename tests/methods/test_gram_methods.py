"""Methods whose weights come from dot products: nuslerp, multislerp, karcher, filter-wise stock.

Against `formulas`, which work on the vectors themselves, in float64.
"""

import time

import numpy as np
import pytest
import torch
from methods import formulas
from methods.formulas import float64
from methods.inputs import (
    DTYPES,
    SHAPE,
    Models,
    assert_close,
    random,
    share_off_by_more_than_a_unit,
)
from methods.trees import apply, merge, merged, programs
from safetensors.torch import save_file

import distmerge
from distmerge.errors import ParameterError, RecipeError
from distmerge.expressions.evaluate import Evaluation
from distmerge.methods.registry import find_method
from distmerge.methods.spherical import karcher_mean

ROWS = {"nuslerp_flatten": False}
COLUMNS = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
LINES = {None: {}, "rows": ROWS, "columns": COLUMNS}
SHAPES = [SHAPE, (63,), (4, 6, 63), (7, 1), (1, 7), (5000, 63)]


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request):
    return request.param


# --- nuslerp


@pytest.mark.parametrize("weight", [[0.3, 0.9], [1.0, 0.0], [0.0, 2.0], [0.5, -0.5], [2.0, -0.5]])
@pytest.mark.parametrize("lines", LINES)
@pytest.mark.parametrize("with_base", [True, False])
def test_nuslerp(dtype, weight, lines, with_base):
    given = Models(dtype, 2, scale=1.0)
    base, base64 = (given.base, given.base64) if with_base else (None, None)
    found = merge("nuslerp", given.models, base, parameters={"weight": weight, **LINES[lines]})
    expected = formulas.nuslerp(given.models64, base64, weight=weight, lines=lines)
    assert_close(found, expected, *given.models64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lines", LINES)
def test_nuslerp_of_any_shape(shape, lines):
    """Columns are the first dimension, whatever follows; a vector is one row and one column."""
    given = Models(torch.float32, 2, shape, scale=0.7)
    found = merge("nuslerp", given.models, parameters={"weight": [0.4, 0.6], **LINES[lines]})
    lines = "rows" if len(shape) == 1 and lines else lines
    expected = formulas.nuslerp(given.models64, weight=[0.4, 0.6], lines=lines)
    assert_close(found, expected, *given.models64)


def test_nuslerp_keeps_the_length_of_lines_of_one_length():
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (random(9, 63, seed=i) for i in (1, 2)))
    found = merge("nuslerp", [a, b], parameters={"weight": [0.2, 0.8], **ROWS})
    assert torch.allclose(found.norm(dim=1), torch.ones(9))
    flat = merge("nuslerp", [a, b], parameters={"weight": [0.2, 0.8]})
    assert not torch.allclose(flat.norm(dim=1), torch.ones(9), atol=1e-3), "one angle for all"


@pytest.mark.parametrize("lines", LINES)
def test_nuslerp_of_lines_without_an_angle(lines):
    """Zero, equal and opposite lines, beside others, leave no NaN."""
    a, b = random(6, 6, seed=1), random(6, 6, seed=2)
    a[0] = b[1] = a[2] = b[2] = 0.0
    a[:, 0] = b[:, 1] = 0.0
    b[3], b[4] = a[3], -a[4]
    found = merge("nuslerp", [a, b], parameters={"weight": [0.3, 0.7], **LINES[lines]})
    expected = formulas.nuslerp([float64(a), float64(b)], weight=[0.3, 0.7], lines=lines)
    assert_close(found, expected, float64(a), float64(b))
    if lines == "rows":
        assert torch.allclose(found[3], a[3])
        assert torch.allclose(found[4], -0.4 * a[4])


def test_nuslerp_streams_what_it_can():
    parameters = {"weight": [0.5, 0.5]}
    seen = {
        shape: [
            find_method("nuslerp").sees({**parameters, **options}, shape)
            for options in LINES.values()
        ]
        for shape in [(63,), SHAPE, (4, 6, 63)]
    }
    assert seen[63,] == seen[SHAPE] == ["elements", "rows", "rows"]
    assert seen[4, 6, 63] == ["elements", "rows", "whole"]
    node = apply("nuslerp", [torch.ones(8, 400, 300)] * 2, parameters={**parameters, **COLUMNS})
    (program,) = programs(node).values()
    whole = Evaluation(program, (8, 400, 300))
    assert not whole.direct
    assert whole.block(0, lambda leaf, span: torch.ones(span[1] - span[0])) is None


@pytest.mark.parametrize("count", [1, 3])
def test_nuslerp_takes_two_models(count):
    for base in (None, torch.ones(2)):
        with pytest.raises(RecipeError, match=f"nuslerp merges 2 models.*, not {count}"):
            merge("nuslerp", [torch.ones(2)] * count, base, parameters={"weight": 1.0})


# --- multislerp


@pytest.mark.parametrize("weight", [[0.7, 0.2, 0.45], [0.9, -0.4, 0.3], [1.0, 0.0, 0.0]])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("eps", [1e-8, 1e-3, 0.0])
def test_multislerp(dtype, weight, normalize, with_base, scale, eps):
    given = Models(dtype, scale=scale)
    base, base64 = (given.base, given.base64) if with_base else (None, None)
    parameters = {"weight": weight, "normalize_weights": normalize, "eps": eps}
    expected = formulas.multislerp(
        given.models64, base64, weight=weight, normalize=normalize, eps=max(eps, 1e-16)
    )
    found = merge("multislerp", given.models, base, parameters=parameters)
    assert_close(found, expected, *[2 * m for m in given.models64])


def test_multislerp_of_one_model_is_that_model():
    base, model = random(63, seed=1), random(63, seed=2)
    for given in (base, None):
        assert torch.equal(merge("multislerp", [model], given, parameters={"weight": 0.3}), model)


@pytest.mark.parametrize(
    ("multiples", "weight", "expected"),
    [
        ([2, -1], [0.5, 0.5], 0.5),
        ([1, 1, -2], [0.25, 0.25, 0.5], -0.5),
        ([0, 0, 0], [0.2, 0.3, 0.5], 0.0),
    ],
)
def test_multislerp_of_directions_that_cancel(multiples, weight, expected):
    """As unit vectors; the weighted sum remains, with lengths."""
    x = random(63, seed=1)
    found = merge("multislerp", [m * x for m in multiples], parameters={"weight": weight})
    assert torch.allclose(found, expected * x, atol=1e-6)


def test_multislerp_leaves_frozen_tensors_alone():
    """No task vector has a direction where nothing was trained."""
    base = random(63, seed=1)
    parameters = {"weight": [0.2, 0.3, 0.5]}
    assert torch.equal(merge("multislerp", [base] * 3, base, parameters=parameters), base)


def test_multislerp_weights_that_add_up_to_zero():
    with pytest.raises(ParameterError, match="normalize_weights: false"):
        merge("multislerp", [torch.ones(2)] * 2, parameters={"weight": [1.0, -1.0]})


# --- karcher


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
@pytest.mark.parametrize(
    "options", [{}, {"max_iter": 999, "tol": 1e-10}, {"max_iter": 1}, {"max_iter": 0}]
)
def test_karcher(dtype, count, scale, options):
    given = Models(dtype, count, scale=scale)
    found = merge("karcher", given.models, parameters=options)
    assert_close(found, formulas.karcher(given.models64, **options), *given.models64)


def test_karcher_is_where_the_arcs_balance():
    """The mean of the logarithms is zero there: a definition, not an algorithm."""
    models = [random(40, seed=i, dtype=torch.float64) for i in range(4)]
    models.append(models[0] + 0.1 * models[1])
    found = merge("karcher", models, parameters={"max_iter": 500, "tol": 1e-13})
    point, tangent = found / found.norm(), torch.zeros(40, dtype=torch.float64)
    for unit in (m / m.norm() for m in models):
        angle = torch.acos(unit @ point)
        tangent += angle / torch.sin(angle) * (unit - torch.cos(angle) * point)
    assert float(tangent.norm()) < 1e-11
    assert abs(float(found.norm() / sum(m.norm() for m in models)) - 1 / 5) < 1e-12


def test_karcher_of_two_is_half_way():
    a, b = random(63, seed=1), random(63, seed=2)
    b = b * (a.norm() / b.norm())
    found = merge("karcher", [a, b])
    assert torch.allclose(found, merge("slerp", [a, b], parameters={"t": 0.5}), atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_karcher_of_copies(count):
    model = random(63, seed=1)
    options = {"max_iter": 999, "tol": 1e-10}
    found = merge("karcher", [model] * count, parameters=options)
    assert torch.allclose(found, model, rtol=1e-6, atol=0)


def test_karcher_without_directions():
    """Zero tensors count in the mean length alone; opposite models have no mean direction."""
    model, zero = random(63, seed=1), torch.zeros(63)
    assert torch.allclose(merge("karcher", [model, zero, 3 * model]), 4 / 3 * model)
    assert torch.equal(merge("karcher", [zero, zero]), zero)
    assert torch.allclose(merge("karcher", [model, -model]), model)
    for options in ({}, {"max_iter": 50, "tol": 0.0}):
        three = [model, -model, random(63, seed=2)]
        assert merge("karcher", three, parameters=options).isfinite().all()


def test_the_iteration_costs_next_to_nothing():
    """On a few numbers, it takes less than the sum of the models, whatever it is asked for."""
    units = np.random.default_rng(1).normal(size=(5, 40))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    start = time.thread_time()
    for _ in range(20):
        karcher_mean(units @ units.T, 999, 1e-10)
    assert time.thread_time() - start < 20 * 0.02


@pytest.mark.full
def test_a_karcher_merge_costs_about_what_a_linear_one_costs(tmp_path):
    """In processor time, reading and writing included; the least of a few tries."""
    models = [str(tmp_path / f"{i}.safetensors") for i in range(4)]
    for seed, path in enumerate(models):
        keys = ("a", "b", "c", "d")
        save_file({key: random(2048, 2048, seed=seed).bfloat16() for key in keys}, path)

    def cost(method, **parameters):
        start = time.process_time()
        recipe = {"merge_method": method, "models": models, "parameters": parameters}
        distmerge.merge(recipe, str(tmp_path / "out"), overwrite=True)
        return time.process_time() - start

    linear = min(cost("linear", weight=1.0) for _ in range(4))
    karcher = min(cost("karcher", max_iter=999, tol=1e-10) for _ in range(4))
    assert karcher < 3 * linear


# --- model stock by rows


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_model_stock_by_rows(dtype, count, shape):
    given = Models(dtype, count, shape)
    for i, model in enumerate(given.models):
        model += (i + 1) * 0.05 * given.base  # something in common
        given.models64[i] = float64(model)
    found = merge("model_stock", given.models, given.base, parameters={"filter_wise": True})
    expected = formulas.model_stock_by_rows(given.models64, given.base64)
    # Where the cosines of short rows come near the pole, the ratio is large.
    ratio = 1.0 if shape[-1] > 1 else count
    assert_close(found, expected, *[ratio * m for m in given.models64], expected)


def test_model_stock_by_rows_where_steps_are_opposite_or_none():
    base, step = random(4, 63, seed=1), torch.ones(63)
    models = [base.clone(), base.clone()]
    models[0][0] += step
    models[1][0] -= step
    models[0][1] += step
    models[1][1] += step
    found = merge("model_stock", models, base, parameters={"filter_wise": True})
    assert torch.equal(found[0], base[0]), "a pole: the base remains"
    assert torch.allclose(found[1], base[1] + step)
    assert torch.equal(found[2:], base[2:])


def test_rows_longer_than_a_block_are_put_together():
    """A vector is one row, so rows and the whole agree."""
    given = Models(torch.float32, 2, (300_000,))
    for name, rows in (("model_stock", {"filter_wise": True}), ("nuslerp", ROWS)):
        weight = {"weight": [0.4, 0.6]} if name == "nuslerp" else {}
        by_rows = merge(name, given.models, given.base, parameters={**weight, **rows})
        whole = merge(name, given.models, given.base, parameters=weight)
        assert torch.allclose(by_rows, whole, rtol=1e-6, atol=1e-6)


def test_model_stock_is_by_rows_or_over_the_model():
    parameters = {"filter_wise": True, "over": "model"}
    with pytest.raises(ParameterError, match="exclude each other"):
        merge("model_stock", [torch.ones(2)] * 2, torch.zeros(2), parameters=parameters)


# --- all of them


CASES = [
    ("nuslerp", 2, True, {"weight": [0.3, 0.9]}, {}),
    ("nuslerp", 2, False, {"weight": [0.3, 0.9], **ROWS}, {"lines": "rows"}),
    ("nuslerp", 2, True, {"weight": [0.3, 0.9], **COLUMNS}, {"lines": "columns"}),
    ("multislerp", 3, True, {"weight": [0.3, 0.9, 0.5]}, {}),
    ("karcher", 4, False, {}, {}),
    ("model_stock", 3, True, {"filter_wise": True}, None),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[4]}")
def test_bfloat16_is_within_a_unit_of_float64(case):
    name, count, with_base, parameters, options = case
    given = Models(torch.bfloat16, count)
    base, base64 = ([given.base], [given.base64]) if with_base else ([None], [])
    found = merge(name, given.models, *base, parameters=parameters)
    assert found.dtype == torch.bfloat16
    if options is None:
        expected = formulas.model_stock_by_rows(given.models64, given.base64)
    else:
        weight = {k: v for k, v in parameters.items() if k == "weight"}
        expected = getattr(formulas, name)(given.models64, *base64, **weight, **options)
    assert share_off_by_more_than_a_unit(found, expected) <= 0.001


def test_weights_differ_by_key():
    """Gradients and filters reach methods that ask."""
    one, two = ({k: random(8, 8, seed=s) for k in "ab"} for s in (1, 2))
    found = merged(apply("nuslerp", [one, two], parameters={"weight": [1.0, 0.0]}))
    assert torch.equal(found["a"], one["a"])
