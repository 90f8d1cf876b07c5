"""Every method on models in bfloat16 and float16: nearly all elements lie within one unit in the
last place of the formula in float64.

What equals a cut is drawn among its equals, and apart; such entries are common in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from methods import formulas
from methods.formulas import float64
from methods.inputs import SHAPE, Models, random, share_off_by_more_than_a_unit
from methods.trees import merge, plain_loops

from distmerge.methods.registry import find_method, method_names

WEIGHT = [0.7, 0.2, 0.45]
SOME = {"weight": WEIGHT, "density": [0.5, 0.3, 0.8]}
PAIR = {"weight": [0.3, 0.9]}
GAMMA = [0.01, 0.1, 0.05]
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A method with its parameters, and its formula of (models, base)."""

    method: str
    formula: Callable[..., np.ndarray]
    parameters: dict[str, Any] = field(default_factory=dict)
    count: int = 3
    base: bool = True
    cuts: Callable[..., np.ndarray] | None = None
    """Entries that equal a cut, of (models, base)."""

    def __str__(self) -> str:
        return self.method


def trimmed(models, base):
    return formulas.ties(models, base, weight=WEIGHT, density=SOME["density"])


def at_the_trim(models, base):
    """Entries that one of the models has at its cut."""
    deltas = [np.abs(m - base) for m in models]
    cuts = [formulas.cut(d, k) for d, k in zip(deltas, SOME["density"], strict=True)]
    return np.any([d == cut for d, cut in zip(deltas, cuts, strict=True)], axis=0)


def banded(elect):
    def formula(models, base):
        how = {"elect": elect, "normalize": False, "scaling": 1.0, "weight": WEIGHT}
        return formulas.breadcrumbs(models, base, density=SOME["density"], gamma=GAMMA, **how)

    return formula


def at_a_band(models, base):
    """The same at either end of what is kept."""
    found = np.zeros(base.shape, dtype=bool)
    for model, density, gamma in zip(models, SOME["density"], GAMMA, strict=True):
        magnitudes = np.abs(model - base)
        ordered = np.sort(magnitudes, axis=None)[::-1]
        keep, outliers = int(density * ordered.size), int(gamma * ordered.size)
        for last in (outliers, outliers + keep):
            found |= magnitudes == ordered[last - 1]
    return found


def dropped(elect):
    def formula(models, base):
        masks = [
            formulas.dare_mask(SHAPE, share, seed=0, key="w", model=i)
            for i, share in enumerate(SOME["density"])
        ]
        how = {"elect": elect, "normalize": False, "rescale": True}
        return formulas.dare(models, base, masks, **SOME, **how)

    return formula


def ranked(elect):
    def formula(models, base):
        how = {"elect": elect, "normalize": bool(elect), "scaling": 1.0, "weight": WEIGHT}
        options = {"density": SOME["density"], "epsilon": [0.15] * 3}
        return formulas.della(models, base, rescale=True, seed=0, **options, **how)

    return formula


def selected(models, base):
    return formulas.sce(models, base, select_topk=0.3)


def at_the_selection(models, base):
    """Variances next to the cut too: those are sums, which float32 rounds."""
    varies = np.var([m - base for m in models], axis=0)
    ordered = np.sort(varies, axis=None)
    cut = ordered[ordered.size - int(0.3 * np.count_nonzero(varies))]
    return np.abs(varies - cut) < 1e-5 * cut


def stock(models, base):
    return formulas.model_stock(models, base)


CASES = [
    Case("linear", lambda m, b: formulas.linear(m, weight=WEIGHT), {"weight": WEIGHT}, base=False),
    Case("slerp", lambda m, b: formulas.slerp(b, m[0], 0.3), {"t": 0.3}, count=1),
    Case("nuslerp", lambda m, b: formulas.nuslerp(m, b, **PAIR), PAIR, count=2),
    Case(
        "multislerp",
        lambda m, b: formulas.multislerp(m, b, weight=WEIGHT),
        {"weight": WEIGHT},
    ),
    Case("karcher", lambda m, b: formulas.karcher(m), base=False),
    Case("model_stock", stock),
    Case(
        "task_arithmetic",
        lambda m, b: formulas.task_arithmetic(m, b, weight=WEIGHT),
        {"weight": WEIGHT},
    ),
    Case("ties", trimmed, SOME, cuts=at_the_trim),
    Case("breadcrumbs", banded(None), {**SOME, "gamma": GAMMA}, cuts=at_a_band),
    Case("breadcrumbs_ties", banded("weighted"), {**SOME, "gamma": GAMMA}, cuts=at_a_band),
    Case("dare_linear", dropped(False), SOME),
    Case("dare_ties", dropped(True), SOME),
    Case("della", ranked("weighted"), SOME),
    Case("della_linear", ranked(None), SOME),
    Case("sce", selected, {"select_topk": 0.3}, cuts=at_the_selection),
    Case("nearswap", lambda m, b: formulas.nearswap(m[0], b, t=0.05), {"t": 0.05}, count=1),
    Case("arcee_fusion", lambda m, b: formulas.arcee_fusion(m[0], b), count=1),
    Case("ram", lambda m, b: formulas.ram(m, b, epsilon=0.05), {"epsilon": 0.05}),
    Case(
        "ramplus_tl",
        lambda m, b: formulas.ramplus_tl(m, b, epsilon=0.05),
        {"epsilon": 0.05},
    ),
    Case(
        "passthrough",
        lambda m, b: formulas.passthrough(m[0], 0.7),
        {"scale": [0.7]},
        count=1,
        base=False,
    ),
    Case("median", lambda m, b: formulas.median(m), base=False),
    Case("max_magnitude", lambda m, b: formulas.max_magnitude(m, b)),
]


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_a_unit_of_float64(case, dtype):
    given = Models(dtype, case.count)
    base = given.base if case.base else None
    found = merge(case.method, given.models, base, parameters=case.parameters)
    assert found.dtype == dtype
    expected = case.formula(given.models64, given.base64)
    if case.cuts is not None:
        apart = case.cuts(given.models64, given.base64)
        assert apart.mean() < 0.15, "most are compared"
        found, expected = found[torch.from_numpy(~apart)], expected[~apart]
    assert share_off_by_more_than_a_unit(found, expected) <= 0.001


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_fisher_within_a_unit_of_float64(dtype):
    given = Models(dtype)
    fishers = [random(*SHAPE, seed=30 + i, dtype=dtype).square() for i in range(3)]
    found = merge("fisher", given.models, fishers=fishers)
    expected = formulas.fisher(given.models64, [float64(f) for f in fishers])
    assert share_off_by_more_than_a_unit(found, expected) <= 0.001


@pytest.mark.parametrize("shape", [(751, 1003), (1, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if find_method(c.method).raw], ids=str)
def test_read_as_it_lies_or_widened_first_the_bits_are_the_same(case, shape):
    """Several blocks, lengths that no vector divides, and NaN and infinity in some places."""
    given = Models(torch.bfloat16, case.count, shape=shape)
    for i, model in enumerate(given.models):
        some = model.view(-1)[i : i + 3]
        some[:] = torch.tensor([math.nan, math.inf, -math.inf])[: len(some)]
    base = given.base if case.base else None
    found = merge(case.method, given.models, base, parameters=case.parameters)
    wide = [model.float() for model in given.models]
    expected = merge(
        case.method, wide, None if base is None else base.float(), parameters=case.parameters
    )
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.nan_to_num(nan=7), expected.bfloat16().nan_to_num(nan=7))


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "breadcrumbs_ties"])
def test_the_loops_that_read_bfloat16_give_the_bits_of_plain_torch(name):
    case = next(case for case in CASES if case.method == name)
    given = Models(torch.bfloat16, case.count, shape=(751, 1003))
    base = given.base if case.base else None
    fused = merge(name, given.models, base, parameters=case.parameters)
    with plain_loops():
        assert torch.equal(fused, merge(name, given.models, base, parameters=case.parameters))


def test_every_builtin_method_is_here():
    builtin = {name for name in method_names() if find_method(name).builtin}
    assert builtin == {case.method for case in CASES} | {"fisher"}
