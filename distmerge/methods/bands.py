"""A band of magnitudes: the largest are outliers and dropped, of the others the largest are kept.

Two cuts, found together: one histogram serves both at first, and a sample brackets both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from distmerge.methods.cutoff import Bracket, Cut, Cutoff, Inside
from distmerge.methods.difference import Operand
from distmerge.methods.fusion import fused_for
from distmerge.methods.operands import elements
from distmerge.methods.random import Draw
from distmerge.methods.ranks import Counts
from distmerge.methods.reductions import Again, Scope


@dataclass(frozen=True, slots=True)
class BandCut:
    """The answer to `band`. Both cuts pick among equals by the same draw: where they are one
    magnitude, an element is not both an outlier and kept."""

    lower: Cut
    """What is above is kept, or an outlier."""
    upper: Cut
    """What is above is an outlier."""

    def at(self, draw: Draw) -> BandCut:
        return BandCut(self.lower.at(draw), self.upper.at(draw))


States = tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class Band:
    """A question; see `band`."""

    x: Operand
    keep: float
    skip: float
    over: Scope = "tensor"
    exact: bool = True

    @property
    def cutoffs(self) -> tuple[Cutoff, Cutoff]:
        """The lower cut's question and the upper one's."""
        lower = Cutoff(self.x, self.keep, self.over, "band", self.skip)
        return lower, replace(lower, rule="outliers")

    def partial(self, state: States | None) -> Any:
        if state is None:
            return self.cutoffs[0].partial(None)
        if (both := self._inside_both(*state)) is not None:
            return both
        pairs = zip(self.cutoffs, state, strict=True)
        return tuple(None if isinstance(s, Cut) else cut.partial(s) for cut, s in pairs)

    def _inside_both(self, lower: Any, upper: Any) -> tuple[Inside, Inside] | None:
        """What both cuts' brackets hold, found in one pass where each is to be listed."""
        listed = all(isinstance(state, Bracket) and state.listed for state in (lower, upper))
        fused = fused_for(self.x)
        if fused is None or not listed or not lower.high < upper.low:
            return None
        ends = lower.low, lower.high, upper.low, upper.high
        above, above_upper, counted, found = fused.inside_both(elements(self.x), *ends)
        first = found <= lower.high
        return (
            Inside(above, counted, None, [found[first]]),
            Inside(above_upper, counted, None, [found[~first]]),
        )

    def merge(self, a: Any, b: Any) -> Any:
        lower, upper = self.cutoffs
        if not isinstance(a, tuple):
            return lower.merge(a, b)
        both = zip((lower, upper), a, b, strict=True)
        return tuple(None if left is None else cut.merge(left, right) for cut, left, right in both)

    def finish(self, total: Any, state: States | None) -> BandCut | Again:
        totals = total if isinstance(total, tuple) else (total, total)
        states = (None, None) if state is None else state
        said = [
            s if isinstance(s, Cut) else cut.finish(counts, s)
            for cut, counts, s in zip(self.cutoffs, totals, states, strict=True)
        ]
        lower, upper = (s.state if isinstance(s, Again) else s for s in said)
        if isinstance(lower, Cut) and isinstance(upper, Cut):
            return BandCut(lower, upper)
        return Again((lower, upper))

    def sampled(self, onto: Counts | None) -> Counts:
        """As `Cutoff.sampled`: one serves both cuts."""
        return self.cutoffs[0].sampled(onto)

    def bracket(self, sampled: Counts) -> States | None:
        """As `Cutoff.bracket`, for both cuts."""
        states = tuple(cut.bracket(sampled) for cut in self.cutoffs)
        return None if states == (None, None) else states  # type: ignore[return-value]

    def bare(self) -> Band:
        return replace(self, x=torch.empty(0, dtype=self.x.dtype))


def band(x: Operand, *, keep: float, skip: float, over: Scope = "tensor") -> Band:
    """The magnitudes between which int(keep * n) of n elements lie when int(skip * n) of the
    largest, or as many as there are besides, are left out."""
    return Band(x, keep, skip, over)
