"""Rows of distmerge against mergekit and against a plain copy, in turn: copy, ours, mergekit, ours
with fsync, and again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.bench import Bench, middle
from benchmarks.models import Floats, read_tensor, weight_bytes
from benchmarks.recipes import WORKS, Work, recipe
from benchmarks.results import Comparison, Result, Skipped
from benchmarks.shapes import gpt2
from benchmarks.tools import CommandFailed, Usage

SEED_SECONDS = 20.9
"""What another library says that TIES takes on three GPT-2s; a sixth of it is wanted."""


def method_row(bench: Bench, method: str) -> list[Result]:
    """One method on the large models."""
    work = WORKS[method]
    if not bench.knows(method):
        return [Skipped(method, method, "not yet")]
    models = bench.models[: 1 + work.tuned]
    label = f"{method}, {len(models)} x {bench.shape.parameters / 1e9:.2g} B bf16"
    return [_compare(bench, method, label, work, models, at_most=work.at_most, copies=work.copies)]


def gpt2_row(bench: Bench) -> list[Result]:
    """TIES on three small models in float32, where start-up counts."""
    models = bench.family(gpt2())
    row, label, work = "ties-gpt2", "ties, 3 x GPT-2 (124 M float32)", WORKS["ties"]
    seconds = SEED_SECONDS / 6
    return [_compare(bench, row, label, work, models, at_most=1 / 10, seconds=seconds)]


def _compare(
    bench: Bench,
    row: str,
    label: str,
    work: Work,
    models: Sequence[Path],
    *,
    at_most: float,
    copies: float | None = None,
    seconds: float | None = None,
) -> Comparison:
    path = bench.write_recipe(row, recipe(work, models))
    nbytes = weight_bytes(models[0])
    sample = _Sample(models[0])
    bench.clear()
    bench.copy(models, nbytes)  # so that what is read is in memory from the first run on
    bench.merge(path)  # so that the loops are compiled, which is once for an installation
    bench.drop_output(nbytes)
    floors: list[float] = []
    ours: list[Usage] = []
    synced: list[Usage] = []
    theirs: list[Usage] = []
    note = ""
    for _ in range(bench.runs):
        floors.append(bench.copy(models, nbytes))
        ours.append(bench.merge(path))
        sample.take("ours", bench.out)
        bench.drop_output(nbytes)
        if bench.mergekit is not None and not note:
            try:
                theirs.append(bench.mergekit_merge(path))
                sample.take("mergekit", bench.out)
                bench.drop_output(nbytes)
            except CommandFailed as error:
                note = "mergekit failed: " + str(error).strip().splitlines()[-1]
            bench.clear()
        synced.append(bench.merge(path, synced=True))
        bench.drop_output(nbytes)
        bench.clear()
    alike = sample.correlation()
    if alike is not None and alike < work.alike:
        note = f"the results differ: correlation {alike:.2f}"
    return Comparison(
        row=row,
        work=label,
        ours=middle([usage.seconds for usage in ours]),
        synced=middle([usage.seconds for usage in synced]),
        floor=middle(floors),
        peak=max(usage.peak for usage in (*ours, *synced)),
        cpu=middle([usage.cpu for usage in ours]),
        mergekit=middle([usage.seconds for usage in theirs]) if theirs else None,
        mergekit_peak=max(usage.peak for usage in theirs) if theirs else None,
        mergekit_cpu=middle([usage.cpu for usage in theirs]) if theirs else None,
        alike=alike,
        at_most=at_most,
        copies=copies,
        seconds=seconds,
        note=note,
    )


class _Sample:
    """One tensor of each tool's output: did both do the same?"""

    def __init__(self, base: Path) -> None:
        self._key = _middle_key(base)
        self._base = read_tensor(base, self._key)
        self._taken: dict[str, Floats] = {}

    def take(self, tool: str, out: Path) -> None:
        if tool not in self._taken:
            self._taken[tool] = read_tensor(out, self._key) - self._base

    def correlation(self) -> float | None:
        """Of what was added to the base; None if only one tool ran."""
        if len(self._taken) < 2:
            return None
        return round(float(np.corrcoef(self._taken["ours"], self._taken["mergekit"])[0, 1]), 3)


def _middle_key(base: Path) -> str:
    """A matrix of the second layer, whatever the architecture calls it."""
    llama, gpt = "model.layers.1.self_attn.o_proj.weight", "transformer.h.1.attn.c_proj.weight"
    try:
        read_tensor(base, llama)
    except KeyError:
        return gpt
    return llama
