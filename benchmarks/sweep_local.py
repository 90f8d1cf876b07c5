"""The row that asks what a sweep saves where models are small and near: sixteen TIES merges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench, middle
from benchmarks.models import weight_bytes
from benchmarks.results import Check, Result
from benchmarks.shapes import gpt2

DENSITIES, WEIGHTS = (0.1, 0.2, 0.35, 0.5), (0.4, 0.7, 1.0, 1.3)
CANDIDATES = len(DENSITIES) * len(WEIGHTS)


def sweep_row(bench: Bench) -> list[Result]:
    """Whole commands: sixteen TIES candidates written by one sweep, against one single run of ours
    and of mergekit's, of which sixteen would take sixteen times as long."""
    models = bench.family(gpt2())
    single = bench.write_recipe("sweep-local-single", _recipe(models))
    space = {"parameters.density": DENSITIES, "parameters.weight": WEIGHTS}
    swept = bench.write_recipe("sweep-local", _recipe(models, grid=space))
    nbytes = weight_bytes(models[0])
    bench.clear()
    bench.merge(single)  # so that the loops are compiled, which is once for an installation
    bench.drop_output(nbytes)
    ours, theirs, sweeps = [], [], []
    for _ in range(bench.runs):
        ours.append(bench.merge(single).seconds)
        bench.drop_output(nbytes)
        if bench.mergekit is not None:
            theirs.append(bench.mergekit_merge(single).seconds)
            bench.drop_output(nbytes)
        words = ("sweep", swept, bench.out, "--quiet")
        sweeps.append(bench.distmerge(*words, synced=False).seconds)
        _drop_candidates(bench)
    took, alone = middle(sweeps), middle(ours)
    work = f"{CANDIDATES} TIES candidates over 3 x GPT-2 (124 M float32), all written, against "
    rows: list[Result] = [
        Check(
            "sweep",
            work + f"{CANDIDATES} times one single run",
            f"{took:.1f} s of {CANDIDATES} x {alone:.1f} s: {took / alone / CANDIDATES:.2f}",
            "0.5",
            took <= 0.5 * CANDIDATES * alone,
        )
    ]
    if theirs:
        times = CANDIDATES * middle(theirs) / took
        measured = f"{took:.1f} s of {CANDIDATES} x {middle(theirs):.1f} s: 1/{times:.0f}"
        rows.append(
            Check(
                "sweep",
                work + f"{CANDIDATES} times mergekit",
                measured,
                "1/40",
                times >= 40,
            )
        )
    return rows


def _drop_candidates(bench: Bench) -> None:
    assert len(list(bench.out.glob("*/distmerge.json"))) == CANDIDATES
    shutil.rmtree(bench.out)
    bench.rest()


def _recipe(models: Sequence[Path], **space: Any) -> str:
    base, *tuned = map(str, models)
    return json.dumps(
        {
            "merge_method": "ties",
            "base_model": base,
            "models": [{"model": one} for one in tuned],
            "parameters": {"weight": 1.0, "density": 0.2},
            **space,
        }
    )
