"""A sweep that is killed, and the same command again: what was finished is left as it is."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from run.family import save_model, weight_bytes
from run.stopping import command, run_until

from distmerge.run.options import MergeOptions
from distmerge.sweeps.definition import load_sweep
from distmerge.sweeps.run import run_sweep

SHARD = "3KB"
RECEIPT = r"\.distmerge/[0-9a-f]{32}/model.*\.json$"
CANDIDATES, SHARDS = 4, 5
"""How many shards each has."""


@pytest.fixture
def definition(tmp_path) -> Path:
    random = torch.Generator().manual_seed(1)
    models = [
        save_model({key: torch.randn(63, 11, generator=random) for key in "abcde"}, tmp_path / name)
        for name in "xyz"
    ]
    keys = {
        "merge_method": "ties",
        "base_model": models[0],
        "models": [{"model": model} for model in models[1:]],
        "parameters": {"weight": 1.0},
        "grid": {"parameters.density": [0.2, 0.4, 0.6, 0.8]},
    }
    path = tmp_path / "sweep.yml"
    path.write_text(json.dumps(keys))
    return path


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """Shards with a receipt or an index, each with its inode and time of last change."""
    found = {}
    for path in sorted(out.glob("*/model-*.safetensors")):
        vouched = list(path.parent.glob(f".distmerge/*/{path.name}.json"))
        if vouched or (path.parent / "model.safetensors.index.json").exists():
            info = path.stat()
            found[str(path.relative_to(out))] = info.st_ino, info.st_mtime_ns
    return found


@pytest.mark.parametrize(
    ("path", "nth", "shards"),
    [
        (RECEIPT, 7, 6),
        (r"index\.json$", 3, CANDIDATES * SHARDS),
    ],
    ids=["one candidate's second shard has its receipt", "two of four candidates are published"],
)
def test_a_killed_sweep_does_only_what_is_missing(definition, tmp_path, path, nth, shards):
    options = MergeOptions(workers=2, max_shard_size=SHARD)
    sweep = load_sweep(str(definition))
    undisturbed = run_sweep(sweep, str(tmp_path / "undisturbed"), options)
    out, marker = tmp_path / "out", tmp_path / "marker"
    given = ["sweep", str(definition), str(out), "--workers", "2", "--max-shard-size", SHARD]
    code = run_until("LocalOutput.write_bytes", path, nth, marker, command, *given)
    assert code == -signal.SIGKILL
    before = finished(out)
    assert len(before) == shards
    events = []
    results = run_sweep(sweep, str(out), options, listener=events.append)
    after = finished(out)
    assert {name: after.get(name) for name in before} == before
    assert len(after) == CANDIDATES * SHARDS
    made = [e.data["shard"] for e in events if e.kind == "unit"]
    assert len(made) == CANDIDATES * SHARDS - shards
    for one, other in zip(results, undisturbed, strict=True):
        assert weight_bytes(one.place) == weight_bytes(other.place), one.name
