"""Between the tests and mergekit 0.1.5, which runs in an environment and a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from benchmarks.mergekit_env import ensure_mergekit  # noqa: E402

DRIVER = Path(__file__).with_name("drive_mergekit.py")


@dataclass(frozen=True)
class Job:
    """One merge."""

    name: str
    recipe: Mapping[str, Any]
    seed: int | None = None

    @property
    def text(self) -> str:
        return yaml.safe_dump(dict(self.recipe), sort_keys=False)


def mergekit_merges(jobs: Sequence[Job], place: Path) -> dict[str, dict[str, Tensor] | str]:
    """What mergekit writes for each job, by its name; or what it raises.

    A process takes ten seconds to start and a merge of small models a tenth of one, so one process
    does all.
    """
    python = ensure_mergekit().with_name("python")
    place.mkdir(parents=True, exist_ok=True)
    given = [
        {"recipe": job.text, "out": str(place / f"{i:04}"), "seed": job.seed}
        for i, job in enumerate(jobs)
    ]
    (place / "jobs.json").write_text(json.dumps(given))
    command = [python, DRIVER, place / "jobs.json", place / "answers.json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    errors = json.loads((place / "answers.json").read_text())
    return {
        job.name: error if error is not None else load_file(f"{told['out']}/model.safetensors")
        for job, told, error in zip(jobs, given, errors, strict=True)
    }
