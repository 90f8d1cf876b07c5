"""Sweeps end to end: every candidate as a merge of its own would make it."""

from __future__ import annotations

import json

import pytest
import torch
from run.family import save_model, weight_bytes
from run.merging import small_models

import distmerge
from distmerge.errors import KeyMismatch, RecipeError, SweepFailed
from distmerge.run.options import MergeOptions
from distmerge.sweeps.definition import load_sweep, setting_text
from distmerge.sweeps.plan import plan_sweep
from distmerge.sweeps.run import run_sweep

OPTIONS = MergeOptions(workers=2, max_shard_size="3KB")


def places_of(sweep, out, options):
    return {one.name: one.place for one in run_sweep(sweep, str(out), options)}


@pytest.fixture
def models(tmp_path):
    return [save_model(m, tmp_path / name) for m, name in zip(small_models(4), "xabc", strict=True)]


def recipe(models, **keys):
    base, *others = models
    plain = {"merge_method": "ties", "base_model": base, "models": [{"model": m} for m in others]}
    return {**plain, "parameters": {"density": 0.5, "weight": 1.0}, **keys}


def test_outputs_are_those_of_single_merges(models, tmp_path):
    grid = {"parameters.density": [0.2, 0.7], "merge_method": ["ties", "dare_ties"]}
    wanted = recipe(models, grid=grid, list=[{"seed": 1}])
    sweep = load_sweep(wanted)
    places = places_of(sweep, tmp_path / "out", OPTIONS)
    assert len(places) == 4
    for candidate in sweep.candidates:
        single = tmp_path / "single" / candidate.name
        changes = [setting_text(path, value) for path, value in candidate.settings.items()]
        distmerge.merge(
            recipe(models), str(single), workers=2, max_shard_size="3KB", overrides=changes
        )
        assert weight_bytes(single) == weight_bytes(places[candidate.name])
        manifests = [
            json.loads((p / "distmerge.json").read_text())
            for p in (single, tmp_path / "out" / candidate.name)
        ]
        assert manifests[0]["digest"] == manifests[1]["digest"]


def test_repeated_it_does_only_what_is_missing(models, tmp_path):
    sweep = load_sweep(recipe(models, grid={"parameters.density": [0.2, 0.7]}))
    out = tmp_path / "out"
    run_sweep(sweep, str(out), OPTIONS)
    first = out / sweep.candidates[0].name / "distmerge.json"
    before = first.read_bytes()
    more = load_sweep(recipe(models, grid={"parameters.density": [0.2, 0.4, 0.7]}))
    run_sweep(more, str(out), OPTIONS)
    assert first.read_bytes() == before
    assert {path.name for path in out.iterdir()} == {c.name for c in more.candidates}


def test_a_candidate_that_fails_does_not_stop_the_others(models, tmp_path):
    sweep = load_sweep(
        recipe(
            models,
            merge_method="task_arithmetic",
            parameters={"weight": 1.0},
            grid={"parameters.lambda": [1.0, 3e38, 0.5]},
        )
    )
    with pytest.raises(SweepFailed) as raised:
        run_sweep(sweep, str(tmp_path / "out"), OPTIONS)
    assert "1 of 3 candidates failed" in str(raised.value)
    assert "lambda=3e+38" in str(raised.value)
    assert "NaN or infinity" in str(raised.value)
    written = {
        path.parent.name for path in (tmp_path / "out").glob("*/model.safetensors.index.json")
    }
    assert written == {"lambda=1.0", "lambda=0.5"}


def test_where_all_fail_none_is_called_done(models, tmp_path):
    keys = recipe(models, merge_method="task_arithmetic", parameters={"weight": 1.0})
    sweep = load_sweep({**keys, "grid": {"parameters.lambda": [3e38, -3e38]}})
    with pytest.raises(SweepFailed, match="Every candidate failed, 2 of 2") as raised:
        run_sweep(sweep, str(tmp_path / "out"), OPTIONS)
    assert "done" not in str(raised.value)


def test_candidates_that_do_not_fit_are_refused_before_anything_is_written(models, tmp_path):
    other = save_model({"z": torch.ones(3)}, tmp_path / "other")
    keys = recipe(models, merge_method="linear", base_model=None, parameters={"weight": 1})
    keys["combinations"] = {"of": [models[1], models[2], other], "size": 2}
    with pytest.raises(RecipeError, match="2 of 3 candidates can't be merged") as raised:
        run_sweep(load_sweep(keys), str(tmp_path / "out"), OPTIONS)
    assert "a+other" in str(raised.value)
    assert not (tmp_path / "out").exists()
    keys["exclude"] = [{"models": {"has": [models[1], other]}}]
    with pytest.raises(KeyMismatch, match="in the candidate b\\+other"):
        plan_sweep(load_sweep(keys), OPTIONS)


def test_the_plan_counts_what_is_read_and_written(models):
    decided = plan_sweep(
        load_sweep(recipe(models, grid={"parameters.density": [0.2, 0.7]})), OPTIONS
    )
    one = 4 * 63 * 11 * 4
    assert decided.bytes_in_apart == 2 * 4 * one
    assert decided.bytes_out == 2 * one
    told = decided.to_json()
    assert [c["settings"] for c in told["candidates"]] == [
        {"parameters.density": 0.2},
        {"parameters.density": 0.7},
    ]
    assert sorted(name for names in told["passes"] for name in names) == [
        "density=0.2",
        "density=0.7",
    ]
