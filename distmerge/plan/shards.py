"""Which tensor goes into which file: a pure function of the output's headers."""

from __future__ import annotations

from collections.abc import Sequence

from distmerge.expressions.program import Scales
from distmerge.plan.work import KeyTask

MB = 1_000_000
ONE_FILE = 512 * MB
"""Up to this size an output is a single file, unless the user says otherwise."""
SMALLEST, LARGEST = 256 * MB, 5000 * MB
"""Bounds of the default shard size, a sixteenth of the output: enough shards to share out among
workers, few enough to list."""


def default_shard_size(total: int) -> int:
    """Bytes of a full shard when the user names no size."""
    return ONE_FILE if total <= ONE_FILE else min(max(total // 16, SMALLEST), LARGEST)


def partition(sizes: Sequence[int], max_shard_size: int) -> list[range]:
    """Cut tensors, in order, into runs of at most `max_shard_size` bytes each.

    A tensor larger than that has a shard to itself.
    """
    shards: list[range] = []
    start = filled = 0
    for i, size in enumerate(sizes):
        if i > start and filled + size > max_shard_size:
            shards.append(range(start, i))
            start, filled = i, 0
        filled += size
    if start < len(sizes):
        shards.append(range(start, len(sizes)))
    return shards


def together(tasks: Sequence[KeyTask]) -> list[list[KeyTask]]:
    """The tasks in order, those that one shard must hold in one list: codes and their scales."""
    groups: list[list[KeyTask]] = []
    for task in tasks:
        if isinstance(task.program.steps[0], Scales):
            groups[-1].append(task)
        else:
            groups.append([task])
    return groups
