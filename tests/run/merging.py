"""Merges that several tests run, and how they compare what comes out."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from run.family import MODELS, SHARD, Family, on_grid
from torch import Tensor

import distmerge
from distmerge.errors import MemoryBudgetError
from distmerge.expressions.nodes import Leaf
from distmerge.plan.plan import Plan
from distmerge.run.merge import plan
from distmerge.write.manifest import EVENTS_FILE

SMALL = 3000
"""Bytes of a shard with which each tensor of `small_models` has one to itself."""


def small_models(count: int) -> list[dict[str, Tensor]]:
    """Four float32 tensors, a to d, of two dozen kilobytes."""
    random = torch.Generator().manual_seed(1)
    return [
        {key: on_grid(torch.randn(63, 11, generator=random)) for key in "abcd"}
        for _ in range(count)
    ]


def everything(family: Family) -> Any:
    """Questions about tensors and about the whole model, random numbers, nested methods."""
    base, law, food, code, verse = (distmerge.open(family.path(name)) for name in MODELS)
    elected = distmerge.ties([base, law, food, code], k=0.3, over="model")
    dropped = distmerge.find_method("dare_ties")([base, food, verse], p=0.5, rescale=True)
    stock = distmerge.find_method("model_stock")([base, elected, law, verse], over="model")
    return 0.5 * stock + dropped * 0.5


def least_memory(what: Any, **options: Any) -> str:
    """The least that a plan can do with, to a MiB."""
    with pytest.raises(MemoryBudgetError) as refused:
        plan(what, allowed_mem="1MiB", **options)
    found = re.search(r"would need ([\d,]+) MiB", str(refused.value))
    assert found
    return f"{int(found[1].replace(',', '')) + 1}MiB"


def run(what: Any, place: Path, **options: Any) -> dict[str, bytes]:
    """Merge into a directory of the same name everywhere; what `comparable` has of it."""
    out = place / "merged"
    settings: dict[str, Any] = {"max_shard_size": SHARD, "out_dtype": "bfloat16", **options}
    distmerge.merge(what, str(out), **settings)
    return comparable(out)


def comparable(out: Path) -> dict[str, bytes]:
    """Every file of a merge by its path, the manifest without the time of day, and without the
    log of that day."""
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    del files[EVENTS_FILE]
    manifest = json.loads(files["distmerge.json"])
    del manifest["created"], manifest["checksum"]
    files["distmerge.json"] = json.dumps(manifest).encode()
    return files


def differing(a: dict[str, bytes], b: dict[str, bytes]) -> list[str]:
    """Names of files that aren't the same, or aren't in both."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def assert_covered(decided: Plan) -> None:
    """Every input tensor is read, for one key unless it is tied, or listed with a reason, once;
    every output key has a source."""
    told = Counter((skipped.model, skipped.key) for skipped in decided.skipped)
    assert not [key for key, count in told.items() if count > 1]
    assert all(skipped.reason for skipped in decided.skipped)
    tasks = [task for unit in decided.units for task in unit.tasks]
    for place, leaf in enumerate(decided.inputs.leaves):
        assert isinstance(leaf, Leaf)
        own = decided.inputs.own_keys[place]
        read = [own.get(t.program.key, t.program.key) for t in tasks if place in t.inputs]
        twice = {key for key, count in Counter(read).items() if count > 1}
        told_of = [s for s in decided.inputs.mappings if s.startswith(f"{leaf}: ")]
        assert all(any(s.endswith(f"read from {key} (tied)") for s in told_of) for key in twice)
        skipped = {skipped.key for skipped in decided.skipped if skipped.model == str(leaf)}
        assert not skipped & set(read)
        assert skipped | set(read) == set(leaf.checkpoint.tensors) | set(leaf.checkpoint.aliases)
    assert all(task.inputs for task in tasks)
