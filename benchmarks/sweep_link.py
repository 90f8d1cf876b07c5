"""The row that asks what a sweep saves where reading is dear: many candidates' scores, from S3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench, middle
from benchmarks.link import put_models
from benchmarks.models import weight_bytes
from benchmarks.results import Check, Result
from benchmarks.servers import loopback_s3, relay
from benchmarks.shapes import flat

MB = 10**6
NBYTES = 48 * MB
"""Of each model: small, so that a single run and the sweep together take two minutes."""
RATE = 8 * MB
"""Bytes a second of the link."""
DENSITIES, WEIGHTS = (0.1, 0.3, 0.5, 0.9), (0.3, 0.6, 1.0, 1.5)
CANDIDATES = len(DENSITIES) * len(WEIGHTS)
WANTED = 6
_JUDGE = """
def norm(state_dict):
    return sum(float(tensor.float().norm()) for tensor in state_dict.collect().values())
"""


def sweep_link_row(bench: Bench) -> list[Result]:
    """Whole commands: sixteen TIES candidates scored and none kept, against one single run, of
    which sixteen would take sixteen times as long, since each reads all inputs."""
    models = bench.family(flat("sweep-link", tensors=24, elements=NBYTES // 48 // 1024 * 1024))
    judge = bench.work / "judging.py"
    judge.write_text(_JUDGE)
    singles, sweeps = [], []
    with loopback_s3() as server:
        put_models(server, models)
        for _ in range(bench.runs):
            bench.clear()
            with relay(server.endpoint, RATE) as link:
                path = bench.write_recipe("sweep-single", _recipe(server, link.url, models))
                singles.append(bench.merge(path).seconds)
            bench.drop_output(weight_bytes(models[0]))
            with relay(server.endpoint, RATE) as link:
                space = {
                    "grid": {"parameters.density": DENSITIES, "parameters.weight": WEIGHTS},
                    "evaluate": {"function": f"{judge}:norm", "distances": False},
                    "keep": "none",
                }
                path = bench.write_recipe("sweep", _recipe(server, link.url, models, **space))
                sweeps.append(bench.distmerge("sweep", path, bench.out, "--quiet").seconds)
            _drop_scores(bench)
    single, swept = middle(singles), middle(sweeps)
    work = (
        f"{CANDIDATES} TIES candidates over 3 x {NBYTES // MB} MB from S3, {RATE // MB} MB/s away, "
        f"scores only, against {CANDIDATES} times one single run"
    )
    times = CANDIDATES * single / swept
    measured = f"{swept:.1f} s of {CANDIDATES} x {single:.1f} s: 1/{times:.1f}"
    return [Check("sweep-link", work, measured, f"1/{WANTED}", times >= WANTED)]


def _drop_scores(bench: Bench) -> None:
    scores = (bench.out / "results.jsonl").read_text().splitlines()
    assert len(scores) == CANDIDATES
    assert all(json.loads(line)["scores"] for line in scores)
    shutil.rmtree(bench.out)


def _recipe(server: Any, url: str, models: Sequence[Path], **space: Any) -> str:
    options = server.storage_options
    options["client_kwargs"]["endpoint_url"] = url
    base, *tuned = (server.url(model.name) for model in models)
    return json.dumps(
        {
            "merge_method": "ties",
            "base_model": base,
            "models": [{"model": model} for model in tuned],
            "parameters": {"weight": 1.0, "density": 0.5},
            "storage_options": options,
            **space,
        }
    )
