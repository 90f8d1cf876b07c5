"""One plan among those that a worker runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from distmerge.checkpoints.store import OutputStore, StorageOptions
from distmerge.errors import DistmergeError
from distmerge.expressions.evaluate import Place
from distmerge.plan.work import WorkUnit
from distmerge.run.unit import UnitRun
from distmerge.run.worker import write_receipt
from distmerge.write.output import open_output
from distmerge.write.shard import Receipt, ShardWriter


@dataclass(frozen=True)
class Candidate:
    """What a worker is told of one plan."""

    digest: str
    output: str
    seed: int
    known: Mapping[Place, Any] = field(default_factory=dict)
    """Answers about the whole model."""
    storage_options: StorageOptions = field(default_factory=dict, repr=False)
    """Kept out of every representation: it may hold credentials."""


class Member:
    """One plan's part in a pass over a unit."""

    def __init__(self, told: Candidate, windows: Sequence[Tensor]) -> None:
        self.told = told
        self.error: DistmergeError | None = None
        self.writer: ShardWriter | None = None
        """Of the unit's shard, from `open` to `receive` or `discard`."""
        self._windows = windows

    @cached_property
    def output(self) -> OutputStore:
        """Where its shards go."""
        output = open_output(self.told.output, self.told.storage_options)
        output.begin(self.told.digest)
        return output

    def open(self, unit: WorkUnit) -> None:
        """Begin the unit's file."""
        pending = self.output.open_write(unit.path)
        self.writer = ShardWriter(pending, unit.header, self._windows, unit.size)

    def discard(self) -> None:
        """Leave nothing of a shard that isn't visible."""
        if self.writer is not None:
            self.writer.discard()
            self.writer = None

    def receive(self, run: UnitRun, bytes_read: int) -> Receipt:
        """Make the shard visible, with its receipt."""
        writer = self.writer
        assert writer is not None
        checksum = writer.commit()
        self.writer = None
        return write_receipt(
            self.output, self.told.digest, run, writer.size, checksum, bytes_read=bytes_read
        )
