"""Many merges in one process: nothing grows."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from run.family import save_model
from run.merging import SMALL, small_models

import distmerge

LOOKS = 20, 30, 40, 50
"""After so many merges we look. At the first, what libraries keep is there: connections, pools."""


def _state(space: Path) -> dict[str, int]:
    gc.collect()
    process = psutil.Process()
    return {
        "memory": process.memory_info().rss,
        "handles": process.num_fds(),
        "threads": threading.active_count(),
        "children": len(process.children()),
        "temporary files": sum(1 for _ in space.rglob("*")),
    }


def soak(models: list[str], outs: list[str], options: dict[str, Any], space: str) -> None:
    """Merge over and over, and print what this process holds; to be run in one of its own."""
    told = []
    for n in range(LOOKS[-1]):
        recipe = {
            "merge_method": "linear",
            "models": [{"model": model} for model in models],
            "parameters": {"weight": 1.0 + n / 100, "normalize": False},
        }
        out = outs[n % len(outs)]
        distmerge.merge(
            recipe, out, max_shard_size=SMALL, overwrite=True, allowed_mem="1500MiB", **options
        )
        if n + 1 in LOOKS:
            told.append(_state(Path(space)))
    print(json.dumps(told))


@pytest.mark.full
def test_fifty_merges_leave_nothing_growing(s3, hub, tmp_path):
    models = [save_model(m, tmp_path / str(i)) for i, m in enumerate(small_models(2))]
    name = f"soak-{uuid.uuid4().hex[:6]}"
    for path in Path(models[1]).iterdir():
        key = f"{name}/model/{path.name}"
        s3.client().put_object(Bucket=s3.bucket, Key=key, Body=path.read_bytes())
    hub.add_repo(f"org/{name}-in", models[1], private=True)
    (tmp_path / "space").mkdir()
    sources = [models[0], s3.url(f"{name}/model"), f"hf://org/{name}-in"]
    outs = [str(tmp_path / "out"), s3.url(f"{name}/out"), f"hf://org/{name}"]
    options = {"storage_options": {"s3://": s3.storage_options}}
    code = "import json, sys; from run.test_soak import soak; soak(*json.loads(sys.argv[1]))"
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps([sources, outs, options, str(tmp_path / "space")])],
        env={
            **os.environ,
            "HF_TOKEN": hub.token,
            "TMPDIR": str(tmp_path / "space"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    before, after = told[0], told[-1]
    # A leak grows in every stretch; a library's pool may grow in one of them.
    grown = [b["memory"] - a["memory"] for a, b in pairwise(told)]
    assert min(grown) <= 4 << 20, grown
    assert sum(grown) <= 32 << 20, grown
    assert after["handles"] <= before["handles"] + 4
    assert after["threads"] <= before["threads"]
    assert after["children"] == before["children"]
    assert after["temporary files"] == before["temporary files"]
