"""Which bytes to ask for together: the arithmetic between tensors and read requests. No I/O."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

Span = tuple[int, int]
"""First byte and one past the last."""


def coalesce(spans: Iterable[Span], *, gap: int) -> list[Span]:
    """The fewest spans that cover `spans`, reading at most `gap` unwanted bytes per hole.

    Sorted and disjoint. Spans that touch or overlap always become one; empty ones vanish.
    """
    if gap < 0:
        raise ValueError(f"gap is {gap}, and a hole has at least 0 bytes")
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if not 0 <= start <= stop:
            raise ValueError(f"{start}:{stop} is not a range of bytes")
        if start == stop:
            continue
        if merged and start - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def split(span: Span, *, part: int) -> list[Span]:
    """`span` in order, as pieces of `part` bytes of which the last may be shorter."""
    if part < 1:
        raise ValueError(f"part is {part}, and a piece has at least 1 byte")
    start, stop = span
    return [(at, min(at + part, stop)) for at in range(start, stop, part)]


class Covered:
    """A growing set of bytes, kept as sorted spans of which no two touch."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Have these bytes too."""
        if start >= stop:
            return
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def missing(self, start: int, stop: int) -> list[Span]:
        """Which of these bytes aren't in it, in order."""
        found, at = [], start
        for i in range(bisect_right(self._stops, start), len(self._starts)):
            if self._starts[i] >= stop:
                break
            if at < self._starts[i]:
                found.append((at, self._starts[i]))
            at = self._stops[i]
        if at < stop:
            found.append((at, stop))
        return found
