"""A weight with an adapter's share: W + scale * B A, row by row, and DoRA's norms on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from distmerge.checkpoints.views import Need, Part, Span, View, widened

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-38
"""A row of this norm or less is all zeros."""


@dataclass(frozen=True)
class Shifted(View):
    """A tensor plus `scale` times another of its shape: a bias with an adapter's."""

    inner: View
    added: Part
    scale: float

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        return *self.inner.parts, self.added

    def needs(self, span: Span) -> list[Need]:
        return [*self.inner.needs(span), (len(self.inner.parts), span)]

    def values(self, span: Span, pieces: Sequence[Tensor]) -> Tensor:
        value = self.inner.values(span, pieces[:-1])
        return widened(value, self.dtype).add_(widened(pieces[-1], self.dtype), alpha=self.scale)


@dataclass(frozen=True)
class LowRank(View):
    """A matrix plus `scale` times the product of two thin ones.

    Convolutions count as matrices with a row for each output channel.
    """

    inner: View
    a: Part
    """rank x inputs."""
    b: Part
    """outputs x rank."""
    scale: float
    swapped: bool = False
    """Does the matrix have its inputs along the first dimension, as embeddings and GPT-2 do?"""
    magnitude: Part | None = None
    """DoRA's: the norm of each output's weights."""

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        own = (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)
        return *self.inner.parts, *own

    @property
    def coded(self) -> bool:
        return self.inner.coded

    @property
    def rank(self) -> int:
        return self.a.info.shape[0]

    @property
    def fixed(self) -> int:
        both = self.a.info.nbytes + (self.b.info.nbytes if self.swapped else 0)
        return self.inner.fixed + both

    @property
    def whole(self) -> bool:
        # Norms over the first dimension are known only at its end.
        return self.inner.whole or (self.swapped and self.magnitude is not None)

    def needs(self, span: Span) -> list[Need]:
        first, last = self.rows(span)
        at = len(self.inner.parts)
        b = (0, self.b.info.elements) if self.swapped else (first * self.rank, last * self.rank)
        found = [*self.inner.needs(self._inner(span)), (at, (0, self.a.info.elements)), (at + 1, b)]
        if self.magnitude is not None:
            norms = (0, self.magnitude.info.elements) if self.swapped else (first, last)
            found.append((at + 2, norms))
        return found

    def _inner(self, span: Span) -> Span:
        """What is needed of the matrix: norms are over whole rows."""
        if self.magnitude is None:
            return span
        first, last = self.rows(span)
        return first * self.row, last * self.row

    def values(self, span: Span, pieces: Sequence[Tensor]) -> Tensor:
        own = 2 if self.magnitude is None else 3
        delta = self._delta(self.rows(span), *pieces[-own:][:2])
        inner = self.inner.values(self._inner(span), pieces[:-own])
        value = widened(inner, self.dtype)
        if self.magnitude is None:
            flat: Tensor = value.add_(delta.reshape(-1)[self.within(span)], alpha=self.scale)
            return flat
        matrix = value.view(delta.shape).add_(delta, alpha=self.scale)
        norms = matrix.norm(dim=0 if self.swapped else 1, keepdim=True).clamp_min_(SMALLEST)
        wanted = widened(pieces[-1], self.dtype).view(norms.shape)
        return matrix.mul_(wanted / norms).view(-1)[self.within(span)]

    def _delta(self, rows: Span, a: Tensor, b: Tensor) -> Tensor:
        """B A for some rows of the matrix."""
        wide_a = widened(a, self.dtype).view(self.rank, -1)
        wide_b = widened(b, self.dtype).view(-1, self.rank)
        if self.swapped:
            return wide_a[:, rows[0] : rows[1]].t().contiguous() @ wide_b.t().contiguous()
        return wide_b @ wide_a
