"""Work units: what an engine hands to a worker. Frozen, self-contained, without any data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from distmerge.checkpoints.location import is_far
from distmerge.checkpoints.tensors import FileInfo, TensorInfo
from distmerge.checkpoints.views import View, stored_bytes
from distmerge.expressions.alignment import spec_of
from distmerge.expressions.program import Program
from distmerge.methods.blocks import BLOCK_ELEMENTS, Grid, grid_of, wide_block

Origin = tuple[int, int]
"""A leaf, and which of its checkpoints: 0 is its own, further ones are those that views read."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where one leaf's bytes are read from, as far as a unit needs it."""

    name: str
    root: str
    revision: str | None
    files: Mapping[str, FileInfo]
    spool: str | None = None
    """Of the checkpoint."""


@dataclass(frozen=True, slots=True)
class KeyTask:
    """One output tensor."""

    program: Program
    shape: tuple[int, ...]
    dtype: str
    """What is written, by safetensors' name."""
    offset: int
    """First byte in the shard file."""
    inputs: Mapping[int, TensorInfo | View | Tensor]
    """By leaf; a tensor where the leaf is a state dict in memory."""
    base: int | None
    """The leaf from which the share of lost deltas is counted."""
    block: int = BLOCK_ELEMENTS
    """Elements of a full block. Wider ones where the memory allows, and the bits don't change."""

    @property
    def grid(self) -> Grid:
        """Its blocks."""
        return grid_of(self.shape, self.block)

    @property
    def item_size(self) -> int:
        """Bytes of an element in the arithmetic."""
        return 8 if any(spec_of(given)[0] == "F64" for given in self.inputs.values()) else 4


def widened(unit: WorkUnit, threads: int) -> WorkUnit:
    """The unit with wide blocks, for so many threads, where the bits don't change."""
    # Keys of one kind share their steps, and there can be a hundred thousand of them.
    seamless: dict[int, bool] = {}
    for task in unit.tasks:
        if id(task.program.steps) not in seamless:
            seamless[id(task.program.steps)] = task.program.seamless
    tasks = (
        _widened(task, threads) if seamless[id(task.program.steps)] else task for task in unit.tasks
    )
    return replace(unit, tasks=tuple(tasks))


def _widened(task: KeyTask, threads: int) -> KeyTask:
    block = wide_block(task.shape, threads)
    # What a view makes, a product of matrices for one, may depend on how much it makes at once.
    if block == task.block or any(isinstance(given, View) for given in task.inputs.values()):
        return task
    return KeyTask(task.program, task.shape, task.dtype, task.offset, task.inputs, task.base, block)


def narrowed(unit: WorkUnit) -> WorkUnit:
    """The unit, its blocks no wider than any method's."""
    if all(task.block == BLOCK_ELEMENTS for task in unit.tasks):
        return unit
    return replace(unit, tasks=tuple(replace(t, block=BLOCK_ELEMENTS) for t in unit.tasks))


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """One shard: the unit of scheduling, retry and resume."""

    index: int
    shard: str
    """File name as the index names it."""
    path: str
    """Where it is written in the output; a lone shard is staged apart until all else is there."""
    header: bytes
    tasks: tuple[KeyTask, ...]
    sources: Mapping[Origin, Source]

    @property
    def bytes_in(self) -> int:
        """Bytes of inputs, each counted once."""
        return sum(stored_bytes(given) for task in self.tasks for given in task.inputs.values())

    @property
    def is_far(self) -> bool:
        """Is an input behind a network?"""
        return any(is_far(source.root) for source in self.sources.values())

    @property
    def size(self) -> int:
        """Bytes of the shard file."""
        last = self.tasks[-1] if self.tasks else None
        if last is None:
            return len(self.header)
        return last.offset + TensorInfo(last.dtype, last.shape, "", 0, 0).nbytes
