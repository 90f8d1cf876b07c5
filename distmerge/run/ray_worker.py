"""The Ray engine's other half, in an actor's process: a `Worker` behind a handshake."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, TypedDict

import cloudpickle
import ray
import torch

from distmerge.checkpoints.retry import requests_again
from distmerge.plan.digest import FORMAT_VERSION, kernel_class
from distmerge.plan.memory import bare_process, fitted
from distmerge.plan.work import Source, WorkUnit
from distmerge.run.bundle import Bundle, ask_bundle, merge_bundle
from distmerge.run.ray_cluster import this_node
from distmerge.run.ray_metrics import Metrics
from distmerge.run.worker import Worker, WorkerSettings
from distmerge.write.shard import Receipt

Moved = tuple[int, int, int]
"""A unit's index, and the bytes of it that have been read and written."""


class Greeting(TypedDict):
    """What a worker says of itself. Only Python's own types: another version must understand it."""

    node: str
    """The machine's address, and the first digits of Ray's id for the node."""
    pid: int
    versions: dict[str, str]
    kernel: str
    """Its class of processor; empty if its versions are others, since it looked no further."""


class RayWorker:
    """A `Worker` in an actor's process."""

    def __init__(self) -> None:
        self._worker: Worker
        self._moved = 0, 0, 0
        self._retries = 0
        self._counting = threading.Lock()
        self._metrics = Metrics()

    def hello(self, expected: Mapping[str, str], settings: bytes, sources: bytes) -> Greeting:
        """Start, unless the versions here are not the driver's.

        Reads a byte of every source: raises if this machine doesn't see what the driver saw, and
        if what this process holds leaves too little of its allowance.
        """
        found = Greeting(node=this_node(), pid=os.getpid(), versions=versions(), kernel="")
        if found["versions"] != dict(expected):
            return found
        told: WorkerSettings = cloudpickle.loads(settings)
        memory = fitted(told.memory, bare_process())
        settings_here = replace(told, memory=memory, node=found["node"])
        self._worker = Worker(settings_here, self._count)
        self._look_at(cloudpickle.loads(sources))
        found["kernel"] = kernel_class(told.device)
        return found

    def _look_at(self, sources: Sequence[Source]) -> None:
        for source in sources:
            file = next(iter(source.files.values()))
            self._worker.open(source).read_into(file, 0, memoryview(bytearray(1)))

    def merge(self, unit: bytes, known: bytes) -> tuple[Receipt, Moved]:
        """See `Worker.merge`; and what it has moved."""
        receipt = self._worker.merge(self._begin(unit), cloudpickle.loads(known))
        self._metrics.add("units", 1, self._worker.settings.node)
        return receipt, self._so_far()

    def ask(self, unit: bytes, known: bytes) -> tuple[bytes, Moved]:
        """See `Worker.ask`. The share goes back pickled: what Ray hands out itself is read-only,
        and partial answers are folded in place."""
        share = self._worker.ask(self._begin(unit), cloudpickle.loads(known))
        return bytes(cloudpickle.dumps(share)), self._so_far()

    def merge_together(self, bundle: bytes, known: bytes) -> tuple[bytes, Moved]:
        """See `merge_bundle`. Pickled, since errors among it may be a user's own."""
        outcome = merge_bundle(self._worker, self._begin(bundle))
        self._metrics.add("units", len(outcome.receipts), self._worker.settings.node)
        return bytes(cloudpickle.dumps(outcome)), self._so_far()

    def ask_together(self, bundle: bytes, known: bytes) -> tuple[bytes, Moved]:
        """See `ask_bundle`."""
        outcome = ask_bundle(self._worker, self._begin(bundle))
        return bytes(cloudpickle.dumps(outcome)), self._so_far()

    @ray.method(concurrency_group="watch")
    def moved(self) -> Moved:
        """What the unit at hand has moved so far; answered while it runs."""
        return self._so_far()

    def _so_far(self) -> Moved:
        with self._counting:
            return self._moved

    def _begin(self, unit: bytes) -> Any:
        begun: WorkUnit | Bundle = cloudpickle.loads(unit)
        with self._counting:
            self._moved = begun.index, 0, 0
        return begun

    def _count(self, read: int, written: int) -> None:
        with self._counting:
            index, r, w = self._moved
            self._moved = index, r + read, w + written
            so_far = requests_again()
            retries, self._retries = so_far - self._retries, so_far
        node = self._worker.settings.node
        self._metrics.add("bytes_read", read, node)
        self._metrics.add("bytes_written", written, node)
        self._metrics.add("retries", retries, node)


def versions() -> dict[str, str]:
    """What must be the same where work is sent and where it is done: of torch and Python what
    decides bits and pickles, the first two numbers."""
    return {
        "distmerge": version("distmerge"),
        "format": str(FORMAT_VERSION),
        "torch": ".".join(torch.__version__.split("+")[0].split(".")[:2]),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }
