"""What random masks do on average: DARE's and DELLA's shares, sums and norms, for every way to
rescale, against what their papers' probabilities say.

Bounds are five standard deviations of a sum of independent draws; seeds are fixed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from methods import formulas
from methods.formulas import float64
from methods.inputs import random
from methods.trees import merge

METHODS = ["dare_linear", "dare_ties", "della_linear", "della"]
DENSITIES = [0.2, 0.5, 0.8]
BASE = random(300, 400, seed=1)
MODEL = BASE + random(300, 400, seed=2, scale=0.1) + 0.02
"""A mean that isn't zero, so that losing it shows."""
DELTA = float64(MODEL) - float64(BASE)


def chances(method, density):
    """Of each entry to be kept."""
    if method.startswith("della"):
        return formulas.della_chances(DELTA, density, 0.15)
    return np.full(DELTA.shape, density)


def step(method, density, rescale, seed):
    """What is added to the base."""
    parameters = {"weight": [1.0], "density": [density], "rescale": rescale}
    return float64(merge(method, [MODEL], BASE, seed=seed, parameters=parameters)) - float64(BASE)


def within(found, terms, chance):
    """Is a sum of terms, each kept with its chance, where it should be?"""
    deviation = np.sqrt((terms**2 * chance * (1 - chance)).sum())
    return abs(found - (terms * chance).sum()) < 5 * deviation + 1e-6 * np.abs(terms).sum()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("seed", [0, 1])
class TestOneModel:
    def test_without_rescaling_share_sum_and_norm_are_those_of_the_chances(
        self, method, density, seed
    ):
        found, chance = step(method, density, False, seed), chances(method, density)
        kept = np.abs(found) > 0.5 * np.abs(DELTA)
        assert within(kept.sum(), np.ones(DELTA.shape), chance)
        assert within(found.sum(), DELTA, chance)
        assert within(np.abs(found).sum(), np.abs(DELTA), chance)

    def test_rescaled_by_the_chances_sum_and_norm_are_the_task_vectors(self, method, density, seed):
        found, chance = step(method, density, "density", seed), chances(method, density)
        assert within(found.sum(), DELTA / chance, chance)
        assert within(np.abs(found).sum(), np.abs(DELTA) / chance, chance)

    def test_rescaled_by_default_the_norm_is_the_task_vectors(self, method, density, seed):
        found = np.abs(step(method, density, True, seed)).sum()
        assert abs(found / np.abs(DELTA).sum() - 1) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_models_and_seeds_draw_apart(method):
    """Two models with one task vector keep other entries, as often together as chance has it."""
    parameters = {"weight": [1.0, 1.0], "density": [0.5, 0.5], "rescale": False}
    if method == "della":
        parameters["normalize"] = False
    both = float64(merge(method, [MODEL, MODEL.clone()], BASE, parameters=parameters))
    kept = np.rint((both - float64(BASE)) / DELTA)
    chance = chances(method, 0.5)
    for times, share in ((0, (1 - chance) ** 2), (1, 2 * chance * (1 - chance)), (2, chance**2)):
        assert within((kept == times).sum(), np.ones(DELTA.shape), share)
    parameters = {"weight": [1.0], "density": [0.5]}
    first, again, other = (
        merge(method, [MODEL], BASE, seed=seed, parameters=parameters) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
