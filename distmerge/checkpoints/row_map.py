"""Rows of matrices in another order, from other matrices, or none: embeddings of one vocabulary
presented in another's.

What a row is made of is said by pairs (which matrix, which row): none for zeros, one for a row as
it is, several for their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from distmerge.checkpoints.tensors import DTYPE_BYTES, TensorInfo
from distmerge.checkpoints.views import (
    Around,
    Composed,
    Joined,
    Need,
    Part,
    Plain,
    Slice,
    Span,
    View,
    wide,
    widened,
)

if TYPE_CHECKING:
    from torch import Tensor

Pairs = tuple[tuple[int, int], ...]
"""Which matrix and which row of it, for each row that a row is the mean of."""


@dataclass(frozen=True)
class Zeros(View):
    """Nothing but zeros; nothing is read."""

    @property
    def parts(self) -> tuple[Part, ...]:
        return ()

    def needs(self, span: Span) -> list[Need]:
        return []

    def values(self, span: Span, pieces: Sequence[Tensor]) -> Tensor:
        import torch

        kind = torch.float64 if self.dtype == "F64" else torch.float32
        return torch.zeros(span[1] - span[0], dtype=kind)


@dataclass(frozen=True)
class Mean(Composed):
    """The mean of views of one shape, element by element."""

    @property
    def fixed(self) -> int:
        return sum(member.fixed for member in self.members)

    def needs(self, span: Span) -> list[Need]:
        found: list[Need] = []
        first = 0
        for member in self.members:
            found += [(first + part, needed) for part, needed in member.needs(span)]
            first += len(member.parts)
        return found

    def values(self, span: Span, pieces: Sequence[Tensor]) -> Tensor:
        used, total = 0, None
        for member in self.members:
            count = len(member.needs(span))
            value = member.values(span, pieces[used : used + count])
            value = widened(value, self.dtype)
            total = value if total is None else total.add_(value)
            used += count
        assert total is not None
        return total.div_(len(self.members))


@dataclass(frozen=True)
class Unfilled(Joined):
    """A matrix with zeros in further rows, for which nothing is read."""

    known: int
    """How many rows the matrix has."""


@dataclass(frozen=True)
class Padded(Around):
    """A matrix with further rows, each of them the mean of its rows.

    The mean is known only at the matrix's end. A merge asks for it as methods ask
    (`distmerge.plan.padding`) and reads `unfilled`; else this is made whole.
    """

    @property
    def unfilled(self) -> Unfilled:
        """The same with nothing in the further rows."""
        rows, *rest = self.inner.shape
        more = Zeros(self.dtype, (self.shape[0] - rows, *rest))
        return Unfilled(self.dtype, self.shape, (self.inner, more), rows)

    @property
    def whole(self) -> bool:
        return True

    def needs(self, span: Span) -> list[Need]:
        return self.inner.needs((0, self.inner.elements))

    def values(self, span: Span, pieces: Sequence[Tensor]) -> Tensor:
        inner = self.inner.values((0, self.inner.elements), pieces)
        rows = inner.to(wide(self.dtype, inner)).view(self.inner.shape)
        padded = rows.new_empty(self.shape)
        padded[: len(rows)] = rows
        padded[len(rows) :] = rows.mean(dim=0)
        return padded.view(-1)[slice(*span)]


@dataclass(frozen=True)
class Elsewhere(Around):
    """A view of another checkpoint, read from here."""

    sources: tuple[int, ...]
    """For each of the inner view's sources, its number here."""

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        return tuple(replace(part, source=self.sources[part.source]) for part in self.inner.parts)

    def needs(self, span: Span) -> list[Need]:
        return self.inner.needs(span)

    def values(self, span: Span, pieces: Sequence[Tensor]) -> Tensor:
        return self.inner.values(span, pieces)


@dataclass(frozen=True)
class Matrix:
    """One of the matrices that rows are taken from."""

    held: TensorInfo | View
    sources: tuple[int, ...] = (0,)
    """Where its checkpoint's sources are found from the checkpoint that presents the rows."""

    def rows(self, first: int, count: int) -> View:
        """Some rows of it, one after the other."""
        held = self.held
        shape = (count, *held.shape[1:])
        row = held.elements // held.shape[0]
        if isinstance(held, TensorInfo) and held.strides is None:
            at, item = held.start + first * row * DTYPE_BYTES[held.dtype], DTYPE_BYTES[held.dtype]
            cut = replace(held, shape=shape, start=at, stop=at + count * row * item)
            return Plain(held.dtype, shape, Part(cut, self.sources[0]))
        if isinstance(held, TensorInfo):
            whole: View = Plain(held.dtype, held.shape, Part(held, self.sources[0]))
        else:
            whole = Elsewhere(held.dtype, held.shape, held, self.sources)
        return Slice(held.dtype, shape, whole, first * row)


def row_map(matrices: Sequence[Matrix], own: int, rows: Sequence[Pairs], padding: int = 0) -> View:
    """A matrix whose rows are made of the matrices' rows, in the dtype of `own`.

    padding: so many rows more, the mean of the others.
    """
    like = matrices[own].held
    members: list[View] = []
    for first, last in _runs(rows):
        pairs, shape = rows[first], (last - first, *like.shape[1:])
        taken = tuple(matrices[which].rows(row, last - first) for which, row in pairs)
        if len(taken) == 1:
            members.append(taken[0])
        else:
            members.append(Mean(like.dtype, shape, taken) if taken else Zeros(like.dtype, shape))
    made = Joined(like.dtype, (len(rows), *like.shape[1:]), tuple(members))
    if not padding:
        return made
    return Padded(like.dtype, (len(rows) + padding, *like.shape[1:]), made)


def _runs(rows: Sequence[Pairs]) -> list[Span]:
    """Rows that follow one another in the matrices too."""
    starts = [
        i
        for i, pairs in enumerate(rows)
        if i == 0 or pairs != tuple((which, row + 1) for which, row in rows[i - 1])
    ]
    return list(zip(starts, [*starts[1:], len(rows)], strict=True))
