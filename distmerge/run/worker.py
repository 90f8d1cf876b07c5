"""What every engine calls: a worker that lives as long as its process and runs units."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distmerge.checkpoints.opening import open_store
from distmerge.checkpoints.store import OutputStore, PendingFile, StorageOptions, Store
from distmerge.expressions.compute_pool import ComputePool, one_torch_thread
from distmerge.expressions.evaluate import Place
from distmerge.expressions.model_questions import KeyPartials
from distmerge.plan.memory import WINDOW, WINDOWS, MemoryPlan
from distmerge.plan.work import Source, WorkUnit
from distmerge.run.allocator import give_back_freed_memory, keep_freed_memory
from distmerge.run.arena import Arena
from distmerge.run.fetch import Fetcher
from distmerge.run.unit import UnitRun
from distmerge.run.unit_context import UnitContext
from distmerge.write.output import open_output
from distmerge.write.shard import Receipt, ShardWriter, receipt_path

OnBytes = Callable[[int, int], None]
"""Told how many bytes were read and written since it was last called."""


@dataclass(frozen=True)
class WorkerSettings:
    """All that a worker needs besides its units."""

    output: str
    digest: str
    memory: MemoryPlan
    threads: int
    seed: int
    device: str = "cpu"
    allow_non_finite: bool = False
    storage_options: StorageOptions = field(default_factory=dict, repr=False)
    """Kept out of every representation: it may hold credentials."""
    node: str = ""
    """Where on a cluster the worker is; told by itself."""


class Worker:
    """Runs units one after the other, with its own threads and memory."""

    def __init__(self, settings: WorkerSettings, on_bytes: OnBytes | None = None) -> None:
        self.settings = settings
        self._on_bytes = on_bytes or (lambda read, written: None)
        keep_freed_memory()
        self._arena = Arena(settings.memory.arena)
        self._windows: list[list[torch.Tensor]] = []
        self._pool = ComputePool(settings.threads)
        self._prefetcher = ThreadPoolExecutor(1, "distmerge-prefetch")
        self._fetcher = Fetcher(self._arena, self.open)
        self._stores: dict[tuple[str, str | None], Store] = {}
        self._opening = threading.Lock()
        self._output: OutputStore | None = None

    def open(self, source: Source) -> Store:
        """The store of a source, opened once."""
        place = (source.root, source.revision)
        with self._opening:
            if place not in self._stores:
                self._stores[place] = open_store(
                    source.root,
                    self.settings.storage_options,
                    revision=source.revision,
                    spool=source.spool,
                )
            return self._stores[place]

    def writer(self, pending: PendingFile, header: bytes, size: int) -> ShardWriter:
        """Into a file; one at a time, since all use the same memory."""
        return ShardWriter(pending, header, self.windows(0), size)

    def windows(self, number: int) -> Sequence[torch.Tensor]:
        """Memory for a writer's output, kept from unit to unit; another for each number."""
        while len(self._windows) <= number:
            self._windows.append([torch.empty(WINDOW, dtype=torch.uint8) for _ in range(WINDOWS)])
        return self._windows[number]

    def merge(self, unit: WorkUnit, known: Mapping[Place, Any]) -> Receipt:
        """Make one shard. Idempotent: twice, or on two machines at once, it leaves the same bytes.

        Raises whatever reading, the method or writing raise; nothing is visible then.
        """
        if self._output is None:
            self._output = open_output(self.settings.output, self.settings.storage_options)
            self._output.begin(self.settings.digest)
        output = self._output
        writer = self.writer(output.open_write(unit.path), unit.header, unit.size)
        try:
            run = self.run(unit, known, writer)
            checksum = writer.commit()
        except BaseException:
            writer.discard()
            raise
        digest, node = self.settings.digest, self.settings.node
        return write_receipt(output, digest, run, writer.size, checksum, node=node)

    def ask(self, unit: WorkUnit, known: Mapping[Place, Any]) -> list[KeyPartials]:
        """What the unit's keys have to say to open questions about the whole model."""
        return self.run(unit, known, None).model_partials

    def run(
        self, unit: WorkUnit, known: Mapping[Place, Any], writer: ShardWriter | None
    ) -> UnitRun:
        """Run a unit into a writer, or, without one, only for its questions."""
        run = UnitRun(unit, self.unit_context(known), writer)
        with one_torch_thread():
            run.run()
        return run

    def unit_context(self, known: Mapping[Place, Any]) -> UnitContext:
        """What every unit of this worker runs with; `known` answers are about the whole model."""
        settings = self.settings
        return UnitContext(
            fetcher=self._fetcher,
            arena_size=settings.memory.arena,
            group=settings.memory.group,
            gathered=settings.memory.gathered,
            pool=self._pool,
            prefetcher=self._prefetcher,
            seed=settings.seed,
            device=settings.device,
            allow_non_finite=settings.allow_non_finite,
            model_answers=known,
            on_bytes=self._on_bytes,
        )

    def close(self) -> None:
        """End the worker's threads, close its files, give its memory back."""
        self._arena.close()
        self._prefetcher.shutdown()
        self._fetcher.close()
        self._pool.close()
        for store in self._stores.values():
            store.close()
        self._windows.clear()
        give_back_freed_memory()


def peak_memory() -> int:
    """This process's high-water mark of resident memory, in bytes."""
    try:
        # On Linux getrusage also counts what a parent held before it started this program.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return usage if sys.platform == "darwin" else usage * 1024


def write_receipt(
    output: OutputStore,
    digest: str,
    run: UnitRun,
    size: int,
    checksum: str,
    *,
    bytes_read: int | None = None,
    node: str = "",
) -> Receipt:
    """The proof that the unit's shard is whole, once its writer has committed it.

    bytes_read: if it isn't the run itself that read.
    """
    receipt = Receipt(
        shard=run.unit.shard,
        checksum=checksum,
        size=size,
        changed=run.tally.changed,
        lost=run.tally.lost,
        bytes_read=run.bytes_read if bytes_read is None else bytes_read,
        peak_memory=peak_memory(),
        node=node,
    )
    output.write_bytes(receipt_path(digest, run.unit.shard), receipt.to_json())
    return receipt
