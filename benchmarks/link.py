"""The row that asks whether a long, narrow link is used: from S3, through a relay."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench, middle
from benchmarks.machine import REPOSITORY
from benchmarks.models import weight_bytes, weight_files
from benchmarks.results import Check, Result
from benchmarks.shapes import flat

MB, MiB = 10**6, 2**20
DELAY = 50
"""Milliseconds there and back."""
ALLOWED = 1024 * MiB


def link_row(bench: Bench) -> list[Result]:
    """A linear merge of three models on S3: the link's share is told by the relay."""
    rate = 40 * MB if bench.small else 100 * MB
    nbytes = (96 if bench.small else 512) * MB
    shape = flat(f"link-{nbytes // MB}", tensors=24, elements=nbytes // 48 // 1024 * 1024)
    models = bench.family(shape)
    shares, peaks = [], []
    with _s3() as server:
        _put(server, models)
        for _ in range(bench.runs):
            bench.clear()
            with _relay(server.endpoint, rate) as link:
                path = bench.write_recipe("link", _recipe(server, link.url, models))
                usage = bench.merge(path, "--allowed-mem", str(ALLOWED))
            bench.drop_output(weight_bytes(models[0]))
            shares.append(0.9 * link.nbytes / link.seconds / rate)
            peaks.append(usage.peak)
    share, peak = middle(shares), max(peaks)
    work = f"linear, 3 x {nbytes // MB} MB from S3, {DELAY} ms and {rate // MB} MB/s away"
    measured = f"{share:.0%} of the link, {peak / MB:,.0f} MB"
    met = share >= 0.8 and peak <= ALLOWED
    return [Check("link", work, measured, f"80%, {ALLOWED / MB:,.0f} MB", met)]


@dataclass
class _Link:
    url: str
    nbytes: int = 0
    seconds: float = 0.0
    """In which the middle nine tenths of the bytes passed; known at the end."""


@contextmanager
def _s3() -> Iterator[Any]:
    """The tests' S3."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    try:
        from servers.s3 import LoopbackS3  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    with LoopbackS3() as server:
        yield server


@contextmanager
def _relay(endpoint: str, rate: int) -> Iterator[_Link]:
    port = endpoint.rpartition(":")[2]
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "slow_link.py")]
    with subprocess.Popen(
        [*command, port, str(DELAY), str(rate)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        link = _Link(f"http://127.0.0.1:{int(process.stdout.readline())}")
        yield link
        told, _ = process.communicate()
        link.nbytes, link.seconds = int(told.split()[0]), float(told.split()[1])


def _put(server: Any, models: Sequence[Path]) -> None:
    """Copy the models to the server, past the relay."""
    client = server.client()
    for model in models:
        for file in (*weight_files(model), *model.glob("*.json")):
            with file.open("rb") as body:
                key = f"{model.name}/{file.name}"
                client.put_object(Bucket=server.bucket, Key=key, Body=body)


def _recipe(server: Any, url: str, models: Sequence[Path]) -> str:
    """Of the models, read through the relay."""
    options = server.storage_options
    options["client_kwargs"]["endpoint_url"] = url
    return json.dumps(
        {
            "merge_method": "linear",
            "models": [{"model": server.url(model.name)} for model in models],
            "parameters": {"weight": 1.0},
            "storage_options": options,
        }
    )
