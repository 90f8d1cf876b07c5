"""The magnitude that the largest share of a tensor's elements reaches, exactly, without sorting.

Magnitudes of IEEE floats order as their bit patterns do. A histogram of the leading 16 bits tells
which bucket holds the k-th largest; a second one of the remaining bits, inside that bucket, finds
it: two passes and half a megabyte however large the tensor (four passes for float64).

The first pass reads a sixteenth of a large tensor. Its histogram says in which few buckets the
cut lies almost certainly; one pass over everything then counts what is above them and lists, or
histograms, what is inside. If the cut lies elsewhere after all, exact passes follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distmerge.methods.difference import Operand, computed
from distmerge.methods.fusion import fused_for
from distmerge.methods.operands import elements
from distmerge.methods.random import Draw
from distmerge.methods.ranks import Counts, bucket_of, kept_count, largest_of
from distmerge.methods.reductions import Again, Scope
from distmerge.methods.sharing import is_shared, once

Rule = Literal["largest", "nonzero", "outliers", "band"]
"""What passes: the largest, at least one; the largest that are not zero; the outliers above a
band; the band and its outliers."""

_LEVELS = {
    torch.float32: ((15, 16), (0, 15)),
    torch.float64: ((47, 16), (31, 16), (15, 16), (0, 15)),
}
"""Per dtype, for each pass, how far to shift the magnitude's bits and how many bits remain."""
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
_FLOAT: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}
_INFINITE = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}
LISTED = 1 << 15
"""Sampled elements inside a bracket up to which what is inside is listed: some megabytes."""
WIDEST = 4
"""Buckets of the first level that a bracket with a histogram may span."""
DEVIATIONS = 6.0
"""Standard deviations of the sampled rank by which a bracket is wider than the estimate."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The answer to `cutoff`."""

    value: float
    """Magnitudes above this one are kept. Infinite when none is."""
    share: float
    """Of the elements whose magnitude equals `value`, the share to keep."""
    draw: Draw | None = None
    """Picks among the equals; set for each block when the answer is handed out."""
    single: bool = False
    """Are magnitudes compared as float32, whatever the tensor's dtype?"""

    def at(self, draw: Draw) -> Cut:
        return replace(self, draw=draw)


NOTHING = Cut(math.inf, 0.0)
EVERYTHING = Cut(0.0, 1.0)


@dataclass(frozen=True, slots=True)
class _Prefix:
    """After some histogram passes: the leading bits of the cut."""

    prefix: int
    above: int
    wanted: int
    level: int


@dataclass(frozen=True, slots=True)
class Bracket:
    """After a sample: the bits between which the cut lies almost certainly."""

    low: int
    high: int
    listed: bool


@dataclass(slots=True)
class Inside:
    """What a bracket pass finds."""

    above: int
    counted: int
    """How many magnitudes there are: finite ones, without zeros where these don't count."""
    counts: Counts | None = field(repr=False)
    """By bits above the bracket's low end; None where they are listed."""
    found: list[Counts] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Cutoff:
    """A question; see `cutoff`. Over the whole model magnitudes are compared as float32: its
    tensors share one histogram, and some may be float64."""

    x: Operand
    keep: float
    over: Scope = "tensor"
    rule: Rule = "largest"
    skip: float = 0.0
    """The share of outliers above a band."""
    exact: bool = True

    def wanted(self, n: int) -> int:
        """How many of `n` magnitudes pass."""
        if self.rule == "largest":
            return kept_count(self.keep, n)
        band = min(n, int(self.keep * n))
        outliers = min(int(self.skip * n), n - band)
        return {"nonzero": band, "outliers": outliers, "band": band + outliers}[self.rule]

    @property
    def dtype(self) -> torch.dtype:
        """Of the magnitudes that are compared."""
        return torch.float32 if self.over == "model" else self.x.dtype

    def partial(self, state: _Prefix | Bracket | None) -> Any:
        if state is None:
            return self.sampled(None)
        if isinstance(state, Bracket):
            return self._inside(state)
        shift, width = _LEVELS[self.dtype][state.level]
        return self._histogram(shift, width, shift + width, state.prefix)

    def sampled(self, onto: Counts | None) -> Counts:
        """The first histogram, which is the same for every share. Parts of a sample are added up in
        `onto`, which is returned: another array for each would take as long as to count it."""
        (shift, width), bits = _LEVELS[self.dtype][0], 8 * self.dtype.itemsize - 1
        if not is_shared():
            return self._histogram(shift, width, bits, 0, onto)
        what = "leading bits", self.dtype, self.rule == "nonzero"
        counts = once(what, [self.x], lambda: self._histogram(shift, width, bits, 0))
        return counts.copy() if onto is None else np.add(onto, counts, out=onto)

    def _histogram(
        self, shift: int, width: int, prefix_shift: int, prefix: int, onto: Counts | None = None
    ) -> Counts:
        """Counts of `width` bits from `shift` on, where the bits from `prefix_shift` on equal
        `prefix`, added to others; infinities and NaN are left out."""
        # Of what fewer can be equal than 32 bits count: blocks, but not every whole tensor.
        kind = np.int32 if self.x.shape.numel() < 1 << 31 else np.int64
        counts = np.zeros(1 << width, kind) if onto is None else onto
        x = self.x if self.x.dtype == self.dtype else computed(self.x).to(self.dtype)
        fused = fused_for(x)
        if fused is not None:
            fused.histogram(elements(x), shift, prefix_shift, prefix, self._least, counts)
        else:
            bits = computed(x).abs().reshape(-1).view(_INTEGER[self.dtype])
            bits = bits[self._counts(bits) & ((bits >> prefix_shift) == prefix)]
            found = torch.bincount((bits >> shift) & ((1 << width) - 1), minlength=1 << width)
            counts += found.cpu().numpy()
        return counts

    @property
    def _least(self) -> int:
        """The bits of the smallest magnitude that counts."""
        return 1 if self.rule == "nonzero" else 0

    def _counts(self, bits: Tensor) -> Tensor:
        return (bits >= self._least) & (bits < _INFINITE[self.dtype])

    def _inside(self, state: Bracket) -> Inside:
        low, high, least = state.low, state.high, self._least
        counts = None if state.listed else np.zeros(high - low + 1, np.int32)
        found = []
        fused = fused_for(self.x)
        if fused is not None:
            if counts is None:
                above, counted, inside = fused.inside(elements(self.x), low, high, least)
                found = [inside]
            else:
                above, counted = fused.bracket(elements(self.x), low, high, least, counts)
        else:
            known = computed(self.x).abs().reshape(-1).view(_INTEGER[self.dtype])
            known = known[self._counts(known)]
            above, counted = int((known > high).sum()), known.numel()
            within = known[(known >= low) & (known <= high)].cpu().numpy()
            if counts is None:
                found = [within]
            else:
                counts += np.bincount(within - low, minlength=len(counts)).astype(np.int32)
        return Inside(above, counted, counts, found)

    def merge(self, a: Any, b: Any) -> Any:
        if isinstance(a, Inside):
            counts, counted = a.counts, a.counted + b.counted
            if counts is not None:  # 32 bits, until there may be more equals than these count
                counts = counts.astype(np.int64, copy=False) if counted >= 1 << 31 else counts
                counts += b.counts
            return Inside(a.above + b.above, counted, counts, a.found + b.found)
        total = a.astype(np.int64, copy=False)
        return np.add(total, b, out=total)

    def finish(self, total: Any, state: _Prefix | Bracket | None) -> Cut | Again:
        if isinstance(state, Bracket):
            return self._finish_bracket(total, state)
        if state is None:
            n = int(total.sum())
            wanted = self.wanted(n)
            if wanted >= n and self.keep > 0.0:
                return EVERYTHING
            if wanted == 0:
                return NOTHING
            state = _Prefix(0, 0, wanted, 0)
        bucket, above = bucket_of(total, state.wanted - state.above)
        above += state.above
        shift, width = _LEVELS[self.dtype][state.level]
        prefix = (state.prefix << width) | bucket
        if shift:
            return Again(_Prefix(prefix, above, state.wanted, state.level + 1))
        return self._cut(prefix, (state.wanted - above) / int(total[bucket]))

    def _finish_bracket(self, total: Inside, state: Bracket) -> Cut | Again:
        wanted = self.wanted(total.counted) - total.above
        if total.counts is None:
            found = np.concatenate(total.found)
            if not 0 < wanted <= len(found):
                return Again(None)
            bits, above, equal = largest_of(found, wanted)
        else:
            if not 0 < wanted <= int(total.counts.sum()):
                return Again(None)
            bucket, above = bucket_of(total.counts, wanted)
            bits, equal = state.low + bucket, int(total.counts[bucket])
        return self._cut(bits, (wanted - above) / equal)

    def _cut(self, bits: int, share: float) -> Cut:
        kind = _FLOAT[self.dtype]
        value = np.array(bits, dtype=f"i{np.dtype(kind).itemsize}").view(kind)
        return Cut(float(value), share, single=self.over == "model")

    def bracket(self, sampled: Counts) -> Bracket | None:
        """A state to begin with, from the first-level histogram of a sample; None to begin
        without."""
        n = int(sampled.sum())
        share = self.wanted(n) / n if n else 0.0
        if self.dtype != torch.float32 or not 0.0 < share < 1.0:
            return None
        rank, margin = share * n, DEVIATIONS * math.sqrt(n * share * (1.0 - share)) + 1
        low, _ = bucket_of(sampled, min(n, math.ceil(rank + margin)))
        high, _ = bucket_of(sampled, max(1, math.floor(rank - margin)))
        listed = int(sampled[low : high + 1].sum()) <= min(LISTED, n / 16)
        if high - low >= WIDEST and not listed:
            return None
        shift, _ = _LEVELS[self.dtype][0]
        return Bracket(max(low << shift, self._least), ((high + 1) << shift) - 1, listed)

    def bare(self) -> Cutoff:
        return replace(self, x=torch.empty(0, dtype=self.x.dtype))


def cutoff(x: Operand, *, keep: float, over: Scope = "tensor", nonzero: bool = False) -> Cutoff:
    """The magnitude that the largest `keep` share of the elements reaches, exactly.

    Among equals at the cut, `keep_above` lets the positional random pick as many as the share
    asks for: light fine-tunes in bfloat16 have few distinct magnitudes, and keeping all equals
    would keep 0.32 of the elements where 0.20 were asked for.

    nonzero: the share is one of the elements that are not zero, and may come to none; otherwise
        at least one element is kept.
    """
    return Cutoff(x, keep, over, "nonzero" if nonzero else "largest")
