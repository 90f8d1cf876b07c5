"""What candidates have in common is computed once, and changes no byte of any of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from run.family import MODELS, make_family, save_model, weight_bytes

import distmerge
from distmerge.errors import SweepFailed
from distmerge.methods import cutoff, operands
from distmerge.plan.bundle import kept_bytes
from distmerge.run.options import MergeOptions
from distmerge.sweeps.definition import load_sweep
from distmerge.sweeps.plan import plan_sweep
from distmerge.sweeps.run import run_sweep


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


def recipe(family, **keys):
    base, *others = (family.path(name) for name in MODELS[:3])
    plain = {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": m} for m in others],
        "parameters": {"density": 0.5, "weight": 1.0},
        "out_dtype": "bfloat16",
    }
    return {**plain, **keys}


def swept(definition, tmp_path, **options):
    """Each candidate's place beside the bytes of its single merge."""
    sweep, settings = load_sweep(definition), MergeOptions(workers=2, **options)
    decided = plan_sweep(sweep, settings)
    results = {r.name: r.place for r in run_sweep(sweep, str(tmp_path / "out"), settings)}
    for candidate, plan in zip(decided.candidates, decided.plans, strict=True):
        single = tmp_path / "single" / candidate.name
        sizes = {name: options[name] for name in ("max_shard_size",) if name in options}
        distmerge.merge(plan.request, str(single), workers=2, **sizes)
        assert weight_bytes(single) == weight_bytes(results[candidate.name]), candidate.name
    return decided


@pytest.fixture
def counted(monkeypatch):
    """Of how many elements task vectors were made, and histograms, and brackets looked through."""
    found = {"differences": 0, "histogram": 0, "inside": 0}

    def count(owner, name, under, size):
        plain = getattr(owner, name)

        def counting(*given, **more):
            found[under] += size(*given)
            return plain(*given, **more)

        monkeypatch.setattr(owner, name, counting)

    def asked(question, *rest):
        return question.x.shape.numel()

    count(operands, "_differences", "differences", lambda models, base: base.numel())
    count(cutoff.Cutoff, "_histogram", "histogram", asked)
    count(cutoff.Cutoff, "_inside", "inside", asked)
    return found


def test_task_vectors_and_histograms_serve_every_candidate(tmp_path, counted):
    random = torch.Generator().manual_seed(0)
    shapes = {"embed": (1500, 1024), "rows": (64, 20_000)}
    models = [
        save_model(
            {key: torch.randn(shape, generator=random) for key, shape in shapes.items()},
            tmp_path / name,
        )
        for name in ("base", "a", "b")
    ]
    base, *others = models
    plain = {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": one} for one in others],
        "parameters": {"density": 0.5, "weight": 1.0},
    }

    def looked_at(place, **grid):
        sweep, settings = load_sweep({**plain, "grid": grid}), MergeOptions(workers=1)
        plan_sweep(sweep, settings)  # the planner tries every program on a small tensor
        probed = dict(counted)
        counted.update(dict.fromkeys(counted, 0))
        run_sweep(sweep, str(tmp_path / place), settings)
        found = {name: counted[name] - probed[name] for name in counted}
        counted.update(dict.fromkeys(counted, 0))
        return found

    densities, lambdas = [0.3, 0.6], [0.2, 0.6, 1.0, 1.4]
    single = looked_at("one", **{"parameters.density": [0.3]})
    eight = looked_at("eight", **{"parameters.density": densities, "parameters.lambda": lambdas})
    elements = sum(rows * columns for rows, columns in shapes.values())
    assert single["inside"] > 0
    assert 0 < eight["differences"] < 2.2 * elements, "two passes and a sample, as one alone takes"
    assert eight["histogram"] <= single["histogram"]
    assert eight["inside"] <= 2 * single["inside"], "one bracket for each density"


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.full)])
def test_global_thresholds_are_found_in_one_pass(family, tmp_path, engine):
    grid = {"parameters.density": [0.2, 0.7], "parameters.lambda": [0.5, 1.0]}
    decided = swept(
        recipe(family, parameters={"weight": 1.0, "density": 0.5, "over": "model"}, grid=grid),
        tmp_path,
        engine=engine,
    )
    assert [len(members) for members in decided.passes] == [4]


@pytest.mark.full
def test_a_pass_on_ray(family, tmp_path):
    listed = [
        {"merge_method": "ties", "parameters.density": 0.2},
        {"merge_method": "ties", "parameters.density": 0.2, "parameters.lambda": 0.5},
        {"merge_method": "dare_ties", "seed": 3},
        {"merge_method": "model_stock", "parameters": {}},
    ]
    decided = swept(recipe(family, list=listed), tmp_path, engine="ray", max_shard_size="9MB")
    assert [len(members) for members in decided.passes] == [4]


def test_parts_of_expressions_are_shared(family, tmp_path):
    base, a, b = (family.path(name) for name in MODELS[:3])
    definition = {
        "models": {"a": a, "b": b, "base": base},
        "merge": "ties(models=[a, b], base=base, density=0.2)",
        "list": [
            {"merge": f"{share} * ties(models=[a, b], base=base, density=0.2) + {1 - share} * base"}
            for share in (0.25, 0.5)
        ]
        + [{"merge": "dare_linear(models=[a, b], base=base, density=0.4) - 0.5 * (a - b)"}],
        "out_dtype": "bfloat16",
    }
    decided = swept(definition, tmp_path)
    assert [len(members) for members in decided.passes] == [3]


def test_the_room_that_a_pass_needs_does_not_depend_on_the_order_of_candidates(family):
    base, a, b = (family.path(name) for name in MODELS[:3])
    elected = "ties(models=[a, b], base=base, density=0.2)"
    definition = {
        "models": {"a": a, "b": b, "base": base},
        "merge": elected,
        "list": [{"merge": elected}, {"merge": f"{elected} * 2"}, {"merge": f"{elected} - base"}],
    }
    plans = plan_sweep(load_sweep(definition), MergeOptions()).plans
    tasks = [max(plan.units[0].tasks, key=lambda t: len(t.program.steps)) for plan in plans]
    assert len({task.program.key for task in tasks}) == 1
    alone = kept_bytes(tasks[:1])
    assert 0 < alone < kept_bytes(tasks)
    assert len({kept_bytes(list(order)) for order in itertools.permutations(tasks)}) == 1


def test_zeros_of_either_sign_are_not_the_same_number(family, tmp_path):
    definition = {
        "models": {"a": family.path(MODELS[0])},
        "merge": "a",
        "list": [{"merge": "(a * 0.0) * 2"}, {"merge": "(a * -0.0) * 2"}],
    }
    decided = swept(definition, tmp_path)
    assert [len(members) for members in decided.passes] == [2]
    first, second = (weight_bytes(tmp_path / "out" / one.name) for one in decided.candidates)
    assert first != second


def test_eight_bits_side_by_side(family, tmp_path):
    grid = {"parameters.density": [0.2, 0.7]}
    swept(recipe(family, out_dtype="float8_e4m3fn", grid=grid), tmp_path)


def test_those_that_follow_one_that_fails_go_on(family, tmp_path):
    lambdas = [3e38, 1.0, 0.5]
    definition = recipe(
        family,
        parameters={"weight": 1000.0, "density": 0.4, "normalize": False},
        grid={"parameters.lambda": lambdas},
    )
    sweep, settings = load_sweep(definition), MergeOptions(workers=2)
    with pytest.raises(SweepFailed, match="1 of 3"):
        run_sweep(sweep, str(tmp_path / "out"), settings)
    decided = plan_sweep(sweep, settings)
    for candidate, plan in list(zip(decided.candidates, decided.plans, strict=True))[1:]:
        single = tmp_path / "single" / candidate.name
        distmerge.merge(plan.request, str(single), workers=2)
        assert weight_bytes(single) == weight_bytes(tmp_path / "out" / candidate.name)
