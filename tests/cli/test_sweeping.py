"""`sweep`: a table before, folders after."""

from __future__ import annotations

import json
from pathlib import Path

from cli.commands import call, recipe


def test_a_dry_run_shows_candidates_and_cost_and_writes_nothing(here):
    path = recipe(
        "sweep.yml", grid={"models.0.parameters.weight": [0.5, 1.0], "dtype": ["bfloat16"]}
    )
    before = {p.name for p in here.iterdir()}
    result = call("sweep", path, "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "weight=0.5,dtype=bfloat16" in result.output
    assert "candidates" in result.output
    assert "merged one by one" in result.output
    assert {p.name for p in here.iterdir()} == before
    told = json.loads(call("sweep", path, "out", "--dry-run", "--json").stdout)
    assert [c["name"] for c in told["candidates"]] == [
        "weight=0.5,dtype=bfloat16",
        "weight=1.0,dtype=bfloat16",
    ]


def test_its_log_is_in_no_models_folder(here):
    path = recipe("sweep.yml", grid={"models.0.parameters.weight": [0.5, 1.0]})
    done = call("sweep", path, "out", "--event-log", "a/log.jsonl")
    assert done.exit_code == 2
    assert "The event log a/log.jsonl is in the folder of" in done.stderr
    assert not (here / "a/log.jsonl").exists()
    assert not (here / "out").exists()


def test_candidates_are_written_and_load(here):
    path = recipe("sweep.yml", grid={"models.0.parameters.weight": [0.5, 1.0]})
    result = call("sweep", path, "out")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in Path("out").iterdir()) == ["weight=0.5", "weight=1.0"]
    assert call("verify", "out/weight=0.5").exit_code == 0
    again = call("sweep", path, "out")
    assert again.exit_code == 0
    assert "holds this merge already" in again.output


def test_failures_are_told_in_words(here):
    result = call("sweep", recipe("sweep.yml"), "out")
    assert result.exit_code == 2
    assert "doesn't say what to sweep over" in result.output
    path = recipe(
        "sweep.yml",
        grid={"models.0.parameters.weight": [1e38, 1.0]},
        parameters={"normalize": False},
    )
    result = call("sweep", path, "out", "--out-dtype", "float16")
    assert result.exit_code == 2
    assert "1 of 2 candidates failed" in result.output
    assert [p.parent.name for p in Path("out").glob("*/model.safetensors")] == ["weight=1.0"]
