"""The row that asks which client of S3 reads best: s3fs, which merges use, and obstore."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench, middle
from benchmarks.machine import REPOSITORY
from benchmarks.models import weight_files
from benchmarks.results import Check, Result, Skipped
from benchmarks.servers import DELAY, loopback_s3, relay
from benchmarks.shapes import flat
from benchmarks.tools import measure

MB = 10**6
UNCAPPED = 1e12
CLIENTS = ("s3fs", "obstore")
WAYS = {
    f"{DELAY} ms, 100 MB/s": (DELAY, 100e6),
    f"{DELAY} ms, no cap": (DELAY, UNCAPPED),
    "straight": None,
}


def clients_row(bench: Bench) -> list[Result]:
    """One object by ranges; each client in turn, so that both meet the same machine."""
    installed = [client for client in CLIENTS if find_spec(client)]
    nbytes = (96 if bench.small else 512) * MB
    shape = flat(f"link-{nbytes // MB}", tensors=24, elements=nbytes // 48 // 1024 * 1024)
    (file,) = weight_files(bench.family(shape)[0])
    results: list[Result] = []
    with loopback_s3() as server:
        with file.open("rb") as body:
            server.client().put_object(Bucket=server.bucket, Key="model/weights", Body=body)
        for way, settings in WAYS.items():
            reads: dict[str, list[tuple[float, float]]] = {client: [] for client in installed}
            for _ in range(bench.runs):
                for client in installed:
                    with _endpoint(server, settings) as endpoint:
                        reads[client].append(_read(bench, server, endpoint, client))
            for client, found in reads.items():
                rate, cpu = (middle(values) for values in zip(*found, strict=True))
                told = f"{rate:,.0f} MB/s, {cpu:.2f} s of processor time per GB"
                work = f"{file.stat().st_size // MB} MB by {client}, {way}"
                results.append(Check("clients", work, told, "the faster one", None))
    missing = [client for client in CLIENTS if client not in installed]
    return results + [Skipped("clients", name, "is not installed") for name in missing]


@contextmanager
def _endpoint(server: Any, settings: tuple[float, float] | None) -> Iterator[str]:
    if settings is None:
        yield server.endpoint
        return
    delay, rate = settings
    with relay(server.endpoint, rate, delay) as link:
        yield link.url


def _read(bench: Bench, server: Any, endpoint: str, client: str) -> tuple[float, float]:
    """MB a second, and seconds of processor time a GB."""
    program = Path(REPOSITORY, "benchmarks", "client_reads.py")
    env = {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
    }
    words = [sys.executable, str(program), client, endpoint, server.bucket, "model/weights"]
    usage = measure(words, log=bench.work / "client.log", env=env)
    nbytes, seconds, cpu = usage.output.split()[-3:]
    return int(nbytes) / MB / float(seconds), float(cpu) / int(nbytes) * 1e9
