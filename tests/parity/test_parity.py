"""The numbers are mergekit's: every method whose result is no matter of chance, for parameters
drawn at random."""

from __future__ import annotations

import random

import pytest
from parity.families import TUNED, make_family, off_by
from parity.oracle import Job, mergekit_merges
from safetensors.torch import load_file

import distmerge

pytestmark = [pytest.mark.full, pytest.mark.timeout(3000)]

DRAWS = 10
"""Recipes for each method."""
FAMILIES = {
    "near": {"step": 2.0**-16},
    "far": {"step": 2.0**-9},
    "scattered": {"step": 2.0**-9, "scattered": True},
}
"""How far fine-tunes are from the base."""


class Dice:
    """Parameters in every form that recipes give them in."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def flag(self):
        return self.random.random() < 0.5

    def choose(self, *of):
        return self.random.choice(of)

    def number(self, low, high):
        return self.random.uniform(low, high)

    def value(self, low, high):
        """A number, a gradient over the layers, or either by filter."""
        form = self.choose("number", "number", "gradient", "filters")
        if form == "gradient":
            return [self.number(low, high) for _ in range(self.choose(1, 2, 3, 5))]
        if form == "filters":
            return [
                {"filter": "mlp", "value": [self.number(low, high) for _ in range(2)]},
                {"filter": self.choose("attn", "q_proj", "norm"), "value": self.number(low, high)},
                {"value": self.number(low, high)},
            ]
        return self.number(low, high)

    def subset(self, low, high):
        return self.random.sample(TUNED, self.random.randint(low, high))


def task_vectors(dice, *, weight=(-0.5, 1.5), density=None, gamma=None):
    """Weights with each model; densities there or for all."""
    each = {"weight": weight}
    if density is not None:
        each["density"] = density
    if gamma is not None:
        each["gamma"] = gamma
    names = dice.subset(1, 4)
    general = {
        "lambda": dice.number(0.3, 1.5),
        "normalize": dice.flag(),
        "rescale": dice.flag(),
    }
    general = {name: value for name, value in general.items() if dice.flag()}
    everywhere = dice.choose(*each) if dice.flag() else None
    models = [
        {name: dice.value(*span) for name, span in each.items() if name != everywhere}
        for _ in names
    ]
    if everywhere is not None:
        general[everywhere] = dice.value(*each[everywhere])
    return names, models, general


def weighted(dice, low, high, *, weight=(0.1, 2.0)):
    names = dice.subset(low, high)
    return names, [{"weight": dice.value(*weight)} for _ in names]


def linear(dice):
    names, models = weighted(dice, 1, 4)
    if dice.flag():
        return names, [{"weight": dice.value(-1.0, 1.0)} for _ in names], {"normalize": False}, None
    return names, models, {}, None


def slerp(dice):
    return [dice.choose(*TUNED)], [{}], {"t": dice.value(0.0, 1.0)}, "base"


def nuslerp(dice):
    flags = {"nuslerp_flatten": dice.flag(), "nuslerp_row_wise": dice.flag()}
    flags = {name: value for name, value in flags.items() if dice.flag()}
    return *weighted(dice, 2, 2), flags, dice.choose(None, "base")


def multislerp(dice):
    general = {"normalize_weights": dice.flag(), "eps": dice.choose(1e-8, 1e-7, 1e-6)}
    general = {name: value for name, value in general.items() if dice.flag()}
    return *weighted(dice, 1, 4), general, dice.choose(None, "base")


def karcher(dice):
    names = dice.subset(2, 4)
    general = {"max_iter": dice.choose(1, 2, 5, 50), "tol": dice.choose(1e-4, 1e-5, 1e-9)}
    general = {name: value for name, value in general.items() if dice.flag()}
    return names, [{} for _ in names], general, None


def task_arithmetic(dice):
    return *task_vectors(dice), "base"


def ties(dice):
    return *task_vectors(dice, density=(0.05, 1.0)), "base"


def breadcrumbs(dice):
    return *task_vectors(dice, density=(0.05, 0.95), gamma=(0.0, 0.2)), "base"


def sce(dice):
    names = dice.subset(2, 4)
    general = dice.choose({}, {"select_topk": dice.number(0.05, 1)})
    return names, [{} for _ in names], general, "base"


def ram(dice):
    names = dice.subset(1, 4)
    return names, [{} for _ in names], {"epsilon": dice.choose(1e-5, 1e-3)}, "base"


def ramplus_tl(dice):
    names = dice.subset(1, 4)
    general = {"epsilon": 1e-3, "r": dice.number(0.0, 1.0), "alpha": dice.number(0.0, 1.0)}
    general = {name: value for name, value in general.items() if name == "epsilon" or dice.flag()}
    return names, [{} for _ in names], general, "base"


def model_stock(dice):
    names = dice.subset(2, 4)
    return names, [{} for _ in names], dice.choose({}, {"filter_wise": dice.flag()}), "base"


def nearswap(dice):
    return [dice.choose(*TUNED)], [{}], {"t": dice.value(1e-4, 0.1)}, "base"


def arcee_fusion(dice):
    return [dice.choose(*TUNED)], [{}], {}, "base"


def passthrough(dice):
    return [dice.choose(*TUNED)], [dice.choose({}, {"scale": dice.value(-2.0, 2.0)})], {}, None


DRAWN = {
    "linear": linear,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs,
    "sce": sce,
    "ram": ram,
    "ramplus_tl": ramplus_tl,
    "model_stock": model_stock,
    "nearswap": nearswap,
    "arcee_fusion": arcee_fusion,
    "passthrough": passthrough,
}


def drawn(method, number, folder):
    """A recipe of both tools, and the seed of its parameters."""
    dice = Dice(f"{method} {number}")
    names, models, general, base = DRAWN[method](dice)
    family = folder / ("scattered" if method == "sce" else dice.choose("near", "far"))
    entries = [
        {"model": str(family / name), **({"parameters": own} if own else {})}
        for name, own in zip(names, models, strict=True)
    ]
    recipe = {"merge_method": method, "models": entries, "dtype": "float32"}
    if method == "karcher" and family.name == "near":
        # In float32, an arc cosine next to one knows only half of an angle's digits.
        recipe |= {"dtype": "float64", "out_dtype": "float32"}
    if general:
        recipe["parameters"] = general
    if base is not None:
        recipe["base_model"] = str(family / base)
    if base is not None and (method == "slerp" or dice.flag()):
        entries.insert(dice.choose(0, len(entries)), {"model": str(family / base)})
    return Job(f"{method}-{number}", recipe)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for name, kind in FAMILIES.items():
        make_family(folder / name, **kind)
    return {
        job.name: job
        for job in (drawn(method, n, folder) for method in DRAWN for n in range(DRAWS))
    }


@pytest.fixture(scope="module")
def theirs(jobs, tmp_path_factory):
    return mergekit_merges(list(jobs.values()), tmp_path_factory.mktemp("mergekit"))


@pytest.mark.parametrize("method", DRAWN)
@pytest.mark.parametrize("number", range(DRAWS))
def test_the_same_numbers(method, number, jobs, theirs, tmp_path):
    name = f"{method}-{number}"
    expected = theirs[name]
    assert not isinstance(expected, str), f"{expected}\n{jobs[name].text}"
    distmerge.merge(jobs[name].text, str(tmp_path / "out"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    gaps = off_by(found, expected)
    worst = max(gaps, key=gaps.__getitem__)
    assert gaps[worst] <= 1e-5, f"{worst}: {gaps[worst]:.2g}\n{jobs[name].text}"
