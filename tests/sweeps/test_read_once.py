"""What the server saw of a sweep: each byte of the inputs once, for however many candidates."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from run.family import names_below, save_model, weight_bytes
from servers.s3 import LoopbackS3
from servers.traffic import SeenRequest

import distmerge
from distmerge.run.options import MergeOptions
from distmerge.sweeps.definition import load_sweep
from distmerge.sweeps.run import run_sweep

DENSITIES = [0.1, 0.3, 0.5, 0.9]
WEIGHTS = [0.2, 0.5, 1.0, 1.5]


MODELS = ("base", "law", "food")
SHAPES = {"embed": (17_000, 63), "proj": (63, 4_001), "long": (300_001,), "norm": (63,)}
"""One is so large that a sample of it is looked at, one has rows longer than a block."""
HEADER = 128 * 1024
"""Bytes that are read of a file, before anything is known of it, to find its header."""


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> list[str]:
    """Three models on this disk."""
    random, place = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("models")
    return [
        save_model(
            {key: torch.randn(shape, generator=random).bfloat16() for key, shape in SHAPES.items()},
            place / name,
        )
        for name in MODELS
    ]


@pytest.fixture(scope="module")
def remote(s3: LoopbackS3, local: list[str]) -> list[str]:
    """The same on S3."""
    client = s3.client()
    for name, folder in zip(MODELS, local, strict=True):
        for path in sorted(names_below(folder)):
            body = Path(folder, path).read_bytes()
            client.put_object(Bucket=s3.bucket, Key=f"sweep/{name}/{path}", Body=body)
    return [s3.url(f"sweep/{name}") for name in MODELS]


def recipe(models: list[str], density: float, weight: float) -> dict[str, object]:
    base, first, second = models
    return {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": first, "parameters": {"weight": weight}}, {"model": second}],
        "parameters": {"density": density, "weight": 1.0},
    }


def test_sixteen_candidates_read_each_byte_once(s3, local, remote, tmp_path):
    grid = {"parameters.density": DENSITIES, "models.0.parameters.weight": WEIGHTS}
    sweep = load_sweep({**recipe(remote, 0.5, 1.0), "grid": grid})
    options = MergeOptions(workers=2, max_shard_size="2MB", storage_options=s3.storage_options)
    with s3.recording() as seen:
        results = run_sweep(sweep, str(tmp_path / "out"), options)
    places = {result.name: result.place for result in results}
    assert len(places) == 16
    for name, folder in zip(MODELS, local, strict=True):
        body = Path(folder, "model.safetensors").read_bytes()
        times = times_sent(seen, f"/{s3.bucket}/sweep/{name}/model.safetensors", len(body))
        assert set(times[HEADER:]) == {1}, name
        assert set(times[:HEADER]) <= {1, 2}, name
    for candidate in sweep.candidates:
        out = tmp_path / "single" / candidate.name
        single = recipe(local, *candidate.settings.values())
        distmerge.merge(single, str(out), workers=2, max_shard_size="2MB")
        assert weight_bytes(out) == weight_bytes(places[candidate.name]), candidate.name


def times_sent(seen: list[SeenRequest], path: str, size: int) -> list[int]:
    """For each byte of a file, how often it was sent."""
    changes = [0] * (size + 1)
    for request in seen:
        if request.method == "GET" and request.path == path and request.status in (200, 206):
            start, stop = 0, size
            if request.range is not None:
                first, last = map(int, request.range.removeprefix("bytes=").split("-"))
                start, stop = first, min(last + 1, size)
            assert request.sent_bytes == stop - start
            changes[start] += 1
            changes[stop] -= 1
    return list(accumulate(changes[:-1]))
