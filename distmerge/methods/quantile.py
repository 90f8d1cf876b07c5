"""The elements of a tensor that stand at given places when it is sorted, exactly, without sorting.

IEEE floats order as their bit patterns do once those of negative ones are turned round. A histogram
of the leading 16 bits tells which bucket holds the element at each place; further ones of the next
16 bits, inside those buckets, find it: two passes (four for float64) however large the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmerge.methods.reductions import Again, Scope

Counts = np.ndarray[Any, Any]
"""A row of 65536 buckets for each prefix."""

_WIDTH = 16
_BUCKETS = 1 << _WIDTH
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True, slots=True)
class _Search:
    """After some passes: for each place, the leading bits of its element."""

    shift: int
    """Bits that are not known yet."""
    prefixes: tuple[int, ...]
    """Signed: the bits that are known, as an integer."""
    ranks: tuple[int, ...]
    """Places among the elements of that prefix, from zero."""

    @property
    def distinct(self) -> list[int]:
        return list(dict.fromkeys(self.prefixes))


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A question; see `quantiles`."""

    x: Tensor
    at: tuple[float, ...]
    over: Scope = "tensor"
    exact: bool = True

    def partial(self, state: _Search | None) -> Counts:
        keys = _sorted_as(self.x[torch.isfinite(self.x)])
        shift = (state.shift if state else 8 * self.x.dtype.itemsize) - _WIDTH
        if state is None:
            return _histogram((keys >> shift) + _BUCKETS // 2)[None]
        above = keys >> state.shift
        digits = (keys >> shift) & (_BUCKETS - 1)
        return np.stack([_histogram(digits[above == prefix]) for prefix in state.distinct])

    def merge(self, a: Counts, b: Counts) -> Counts:
        a += b
        return a

    def finish(self, total: Counts, state: _Search | None) -> tuple[float, ...] | Again:
        dtype = self.x.dtype
        shift = (state.shift if state else 8 * dtype.itemsize) - _WIDTH
        if state is None:
            count = int(total.sum())
            if not count:
                return (0.0,) * len(self.at)
            ranks = [int(share * (count - 1)) for share in self.at]
            found = [(bucket - _BUCKETS // 2, rest) for bucket, rest in _find(total[0], ranks)]
        else:
            rows = [total[state.distinct.index(prefix)] for prefix in state.prefixes]
            places = zip(state.prefixes, rows, state.ranks, strict=True)
            found = [
                ((prefix << _WIDTH) | bucket, rest)
                for prefix, row, rank in places
                for bucket, rest in _find(row, [rank])
            ]
        prefixes, rests = zip(*found, strict=True)
        if shift:
            return Again(_Search(shift, prefixes, rests))
        return tuple(_sorted_as(torch.tensor(prefixes, dtype=_INTEGER[dtype])).view(dtype).tolist())

    def bare(self) -> Quantiles:
        return replace(self, x=self.x.new_empty(0))


def quantiles(x: Tensor, at: Sequence[float]) -> Quantiles:
    """The elements at the places floor(share * (n - 1)) of the n finite ones in ascending order,
    for each share in `at`: a tuple of floats, zeros if there are none."""
    return Quantiles(x, tuple(at))


def _sorted_as(x: Tensor) -> Tensor:
    """Integers in the order of the floats; given such integers, the bits of the floats."""
    bits = x.view(_INTEGER[x.dtype]) if x.dtype.is_floating_point else x
    mask = torch.iinfo(bits.dtype).max
    return bits ^ ((bits >> (8 * bits.dtype.itemsize - 1)) & mask)


def _histogram(digits: Tensor) -> Counts:
    counts: Counts = torch.bincount(digits.reshape(-1), minlength=_BUCKETS).cpu().numpy()
    return counts


def _find(counts: Counts, ranks: Sequence[int]) -> list[tuple[int, int]]:
    """For each rank, its bucket and its rank inside that."""
    below = np.cumsum(counts)
    buckets = np.searchsorted(below, ranks, side="right")
    return [
        (int(bucket), rank - int(below[bucket] - counts[bucket]))
        for bucket, rank in zip(buckets, ranks, strict=True)
    ]
