"""Masks that are drawn at random are others than mergekit's, and distributed as mergekit's."""

from __future__ import annotations

import numpy as np
import pytest
from parity.families import make_family
from parity.oracle import Job, mergekit_merges
from safetensors.torch import load_file

import distmerge

pytestmark = [pytest.mark.full, pytest.mark.timeout(3000)]

SEEDS = range(16)
METHODS = ["dare_linear", "dare_ties", "della_linear", "della"]
FAR = 6.0
"""Standard errors; a thousand means of sixteen are compared."""


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"), step=2.0**-12, hidden=32, vocabulary=200)


def recipe(family, method, rescale):
    models = [
        {"model": str(family / name), "parameters": {"weight": weight, "density": density}}
        for name, weight, density in (("a", 0.6, 0.3), ("b", 0.4, 0.7))
    ]
    return {
        "merge_method": method,
        "base_model": str(family / "base"),
        "models": models,
        "parameters": {"rescale": rescale},
        "dtype": "float32",
    }


@pytest.fixture(scope="module")
def jobs(family):
    return {
        f"{method}-{rescale}-{seed}": Job(
            f"{method}-{rescale}-{seed}", recipe(family, method, rescale), seed + 1
        )
        for method in METHODS
        for rescale in (True, False)
        for seed in SEEDS
    }


@pytest.fixture(scope="module")
def theirs(jobs, tmp_path_factory):
    return mergekit_merges(list(jobs.values()), tmp_path_factory.mktemp("mergekit"))


def statistics(merged, base):
    """By tensor: the share of entries that changed, their sum and L1 norm, by entry."""
    found = {}
    for key, tensor in merged.items():
        step = (tensor.double() - base[key].double()).numpy()
        found[key] = np.array([(step != 0).mean(), step.mean(), np.abs(step).mean()])
    return found


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_share_mean_and_norm_are_mergekits(method, rescale, family, jobs, theirs, tmp_path):
    base = load_file(family / "base" / "model.safetensors")
    ours, others = [], []
    for seed in SEEDS:
        job = jobs[f"{method}-{rescale}-{seed}"]
        assert not isinstance(theirs[job.name], str), theirs[job.name]
        others.append(statistics(theirs[job.name], base))
        out = tmp_path / str(seed)
        distmerge.merge(job.text, str(out), seed=seed)
        ours.append(statistics(load_file(out / "model.safetensors"), base))
    for key in base:
        a, b = (np.array([one[key] for one in side]) for side in (ours, others))
        error = np.sqrt((a.var(axis=0, ddof=1) + b.var(axis=0, ddof=1)) / len(SEEDS))
        gap = np.abs(a.mean(axis=0) - b.mean(axis=0))
        assert (gap <= FAR * error + 1e-7).all(), f"{key}: {gap} of {error}"
