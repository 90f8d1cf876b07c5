"""Tensors that no file holds as they are presented: made from parts of files as they are read.

A view says, from headers alone, which elements of which parts a run of its own elements needs, and
makes the run from them. So reads and memory are planned as for any other tensor, and whoever merges
sees a tensor like any other. No value is kept between two runs: what a run gives depends on the run
alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from distmerge.checkpoints.tensors import FLOAT_DTYPES, Shaped, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

Span = tuple[int, int]
"""First element and one past the last, in row-major order."""
Need = tuple[int, Span]
"""Which of a view's parts, and which of its elements."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a file that a view reads."""

    info: TensorInfo
    source: int = 0
    """0 is the checkpoint that the view is in; see `Checkpoint.source`."""


@dataclass(frozen=True)
class View(Shaped):
    """A tensor by what it is made of. Subclasses say how."""

    dtype: str
    """What it is written in if nothing else is asked for; values are float32 (float64 for F64)."""
    shape: tuple[int, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        raise NotImplementedError

    @property
    def fixed(self) -> int:
        """Bytes that every run needs, however short."""
        return 0

    @property
    def whole(self) -> bool:
        """Must all of it be made at once?"""
        return False

    @property
    def coded(self) -> bool:
        """Is it held in 8 bits?"""
        return False

    def needs(self, span: Span) -> list[Need]:
        """What to read for a run of elements; more for a longer run that holds it."""
        raise NotImplementedError

    def values(self, span: Span, pieces: Sequence[Tensor]) -> Tensor:
        """The run, flat, from what `needs` asked for, each flat and in its file's dtype."""
        raise NotImplementedError

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_DTYPES

    # --- rows, for views that are made row by row

    @property
    def row(self) -> int:
        """Elements of one of the first dimension's slices."""
        return self.elements // self.shape[0] if self.shape and self.shape[0] else 1

    def rows(self, span: Span) -> Span:
        """The rows that a run touches."""
        return span[0] // self.row, -(-span[1] // self.row)

    def within(self, span: Span) -> slice:
        """Where the run lies among the elements of the rows that it touches."""
        first = self.rows(span)[0] * self.row
        return slice(span[0] - first, span[1] - first)


@dataclass(frozen=True)
class Plain(View):
    """One part as it is."""

    part: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.part,)

    def needs(self, span: Span) -> list[Need]:
        return [(0, span)]

    def values(self, span: Span, pieces: Sequence[Tensor]) -> Tensor:
        eight = self.part.info.dtype.startswith("F8_")  # torch does little with these
        return widened(pieces[0], self.dtype) if eight else pieces[0]


@dataclass(frozen=True)
class Around(View):
    """Another view, presented in another way."""

    inner: View

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.inner.parts

    @property
    def fixed(self) -> int:
        return self.inner.fixed

    @property
    def whole(self) -> bool:
        return self.inner.whole

    @property
    def coded(self) -> bool:
        return self.inner.coded


@dataclass(frozen=True)
class Composed(View):
    """Several views, put together."""

    members: tuple[View, ...]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for member in self.members for part in member.parts)

    @property
    def coded(self) -> bool:
        return any(member.coded for member in self.members)

    @property
    def whole(self) -> bool:
        return any(member.whole for member in self.members)


@dataclass(frozen=True)
class Slice(Around):
    """A run of another view's elements, under a shape of its own."""

    first: int

    def _inner(self, span: Span) -> Span:
        return self.first + span[0], self.first + span[1]

    def needs(self, span: Span) -> list[Need]:
        return self.inner.needs(self._inner(span))

    def values(self, span: Span, pieces: Sequence[Tensor]) -> Tensor:
        return self.inner.values(self._inner(span), pieces)


@dataclass(frozen=True)
class Joined(Composed):
    """Other views, one behind the other: what is stacked, or joined along the first dimension."""

    @cached_property
    def fixed(self) -> int:
        return max((member.fixed for member in self.members), default=0)

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(member.elements for member in self.members)]

    @cached_property
    def _first_parts(self) -> list[int]:
        return [0, *accumulate(len(member.parts) for member in self.members)]

    def _runs(self, span: Span) -> list[tuple[int, Span]]:
        """The members that a run touches, and its share of each."""
        found = []
        at = bisect_right(self._starts, span[0]) - 1
        while at < len(self.members) and self._starts[at] < span[1]:
            start, stop = self._starts[at], self._starts[at + 1]
            run = max(span[0], start) - start, min(span[1], stop) - start
            if run[0] < run[1]:
                found.append((at, run))
            at += 1
        return found

    def needs(self, span: Span) -> list[Need]:
        return [
            (self._first_parts[at] + part, needed)
            for at, run in self._runs(span)
            for part, needed in self.members[at].needs(run)
        ]

    def values(self, span: Span, pieces: Sequence[Tensor]) -> Tensor:
        found: list[Tensor] = []
        used = 0
        for at, run in self._runs(span):
            member = self.members[at]
            count = len(member.needs(run))
            found.append(member.values(run, pieces[used : used + count]))
            used += count
        if len(found) == 1:
            return found[0]
        whole = found[0].new_empty(span[1] - span[0], dtype=wide(self.dtype, found[0]))
        at = 0
        for piece in found:
            whole[at : at + len(piece)] = piece
            at += len(piece)
        return whole


def wide(dtype: str, like: Tensor) -> Any:
    """torch's dtype of a view's arithmetic: float64 for F64, else float32."""
    kind = like.new_empty(0).double() if dtype == "F64" else like.new_empty(0).float()
    return kind.dtype


def widened(piece: Tensor, dtype: str) -> Tensor:
    """A copy of a piece in the arithmetic's dtype: products of matrices can depend on where in
    memory their operands lie, and a copy always lies alike."""
    return piece.to(wide(dtype, piece), copy=True)


def as_view(found: TensorInfo | View) -> View:
    """A tensor of the checkpoint itself as a view."""
    if isinstance(found, View):
        return found
    return Plain(found.dtype, found.shape, Part(found))


def parts_of(found: object) -> tuple[Part, ...]:
    """What is read of files for an input of any kind; nothing for a tensor in memory."""
    if isinstance(found, View):
        return found.parts
    return (Part(found),) if isinstance(found, TensorInfo) else ()


def stored_bytes(found: object) -> int:
    """Bytes of files behind an input of any kind."""
    if isinstance(found, TensorInfo):
        return found.nbytes
    return sum(part.info.nbytes for part in parts_of(found))


def fixed_bytes(found: object) -> int:
    """Bytes of it that are read however few of its elements are wanted."""
    return found.fixed if isinstance(found, View) else 0
