"""The boundary between rows and the tests' servers, with a long, narrow link before them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.machine import REPOSITORY

DELAY = 50
"""Milliseconds there and back."""


@dataclass
class Link:
    """A relay to a server."""

    url: str
    nbytes: int = 0
    seconds: float = 0.0
    """In which the middle nine tenths of the bytes passed; known at the end."""

    def share(self, rate: float) -> float:
        """Of that many bytes a second, how much passed."""
        return 0.9 * self.nbytes / self.seconds / rate


@contextmanager
def relay(endpoint: str, rate: float, delay: float = DELAY) -> Iterator[Link]:
    """A link to `endpoint`: bytes per second, milliseconds there and back."""
    port = endpoint.rpartition(":")[2]
    host = endpoint.rpartition(":")[0].rpartition("/")[2]
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "slow_link.py")]
    with subprocess.Popen(
        [*command, f"{host}:{port}", str(delay), str(rate)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        link = Link(f"http://127.0.0.1:{int(process.stdout.readline())}")
        yield link
        told, _ = process.communicate()
        link.nbytes, link.seconds = int(told.split()[0]), float(told.split()[1])


@contextmanager
def loopback_s3() -> Iterator[Any]:
    """The tests' S3."""
    with _tests(), _imported("servers.s3", "LoopbackS3")() as server:
        yield server


@contextmanager
def loopback_hub() -> Iterator[Any]:
    """The tests' Hub."""
    with _tests(), _imported("servers.hub", "LoopbackHub")() as server:
        yield server


def _imported(module: str, name: str) -> Any:
    from importlib import import_module

    return getattr(import_module(module), name)


@contextmanager
def _tests() -> Iterator[None]:
    folder = str(REPOSITORY / "tests")
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
