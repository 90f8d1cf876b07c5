"""Which rank a density asks for, and in which bucket of a histogram it lies."""

from __future__ import annotations

from typing import Any

import numpy as np

Counts = np.ndarray[Any, Any]
RUN = 256
"""Buckets that are looked at together first."""


def bucket_of(counts: Counts, wanted: int) -> tuple[int, int]:
    """The bucket that holds the `wanted`-th from the top, and how many lie above that bucket."""
    # Runs of buckets first: to add up all of 65,536 one by one takes five times as long.
    runs = np.add.reduceat(counts, np.arange(0, len(counts), RUN), dtype=np.int64)
    run, above = _reached(runs, wanted)
    inside, over = _reached(counts[run * RUN : (run + 1) * RUN], wanted - above)
    return run * RUN + inside, above + over


def _reached(counts: Counts, wanted: int) -> tuple[int, int]:
    from_top = np.cumsum(counts[::-1], dtype=np.int64)
    place = int(np.searchsorted(from_top, wanted))
    bucket = len(counts) - 1 - place
    return bucket, int(from_top[place] - counts[bucket])


def largest_of(found: Counts, wanted: int) -> tuple[int, int, int]:
    """The `wanted`-th largest; how many are larger, and how many equal it."""
    # Sorted: with as many equals as bfloat16 has, np.partition takes ten times as long.
    in_order = np.sort(found)
    value = in_order[len(found) - wanted]
    first, last = np.searchsorted(in_order, [value, value + 1])
    return int(value), len(found) - int(last), int(last - first)


def kept_count(keep: float, n: int) -> int:
    """How many of `n` elements a density keeps: at least one, unless it is zero or less."""
    if keep >= 1.0:
        return n
    return max(1, int(keep * n)) if keep > 0.0 and n else 0
