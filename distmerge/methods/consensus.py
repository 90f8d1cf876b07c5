"""How sparse task vectors become one: a weighted sum, or the mean of those that agree in sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distmerge.methods.bands import BandCut
from distmerge.methods.cutoff import EVERYTHING, Cut
from distmerge.methods.difference import Operand, computed
from distmerge.methods.fusion import fused_for
from distmerge.methods.operands import elements, rows
from distmerge.methods.trim import edges, trim
from distmerge.methods.unrounded import Unrounded, unrounded_allowed

SignWeighting = Literal["weighted", "paper"]
"""Whose sum elects a sign: the weighted task vectors', or the task vectors' as they are. What
has weight zero has no vote either way."""


@dataclass(frozen=True, slots=True)
class Consensus:
    """How task vectors are put together, and onto the base."""

    weights: Sequence[float]
    elect: SignWeighting | None = None
    """Elect a sign for every entry, zero counting as positive, and leave out what has another;
    None: add up everything."""
    normalize: bool = False
    """Divide by the sum of the weights that went in, or by one where that is zero."""
    scale: float = 1.0
    """Lambda: what the result is multiplied with before it is added to the base."""
    least: float = -math.inf
    """The sum of elected weights counts as no less when it divides."""

    def merge(
        self,
        base: Tensor,
        deltas: Sequence[Operand],
        factors: Sequence[float] | None = None,
        *,
        cuts: Sequence[Cut | BandCut] | None = None,
    ) -> Tensor | Unrounded:
        """base + scale * combination of the task vectors, trimmed if there are `cuts`, and then
        multiplied with the `factors`; unrounded, where that is allowed."""
        factors = factors or [1.0] * len(deltas)
        fused = fused_for(*deltas)
        if fused is not None:
            return self._fused(fused, base, deltas, factors, cuts or [EVERYTHING] * len(deltas))
        kept = [computed(delta) for delta in deltas]
        if cuts is not None:
            kept = [trim(delta, cut) for delta, cut in zip(kept, cuts, strict=True)]
        kept = [k if f == 1.0 else k * f for k, f in zip(kept, factors, strict=True)]
        return base + self._combined(kept) * self.scale

    @property
    def _votes(self) -> Sequence[float]:
        """What entries are multiplied with when signs are elected and compared."""
        if self.elect == "weighted":
            return self.weights
        return [0.0 if weight == 0.0 else 1.0 for weight in self.weights]

    def _fused(
        self,
        fused: ModuleType,
        base: Tensor,
        deltas: Sequence[Operand],
        factors: Sequence[float],
        cuts: Sequence[Cut | BandCut],
    ) -> Tensor | Unrounded:
        trims = [edges(cut) for cut in cuts]
        operand, held = rows(deltas)
        given = (
            np.array([trim.bounds for trim in trims], np.float32),
            np.array([trim.stream for trim in trims], np.uint64),
            np.array([trim.first for trim in trims], np.int64),
            np.array(self.weights, np.float32),
            np.array(self._votes, np.float32),
            np.array(factors, np.float32),
            self.elect is not None,
            self.normalize,
            np.float32(self.least),
            np.float32(self._divisor),
            np.float32(self.scale),
        )

        def make(out: Any) -> None:
            fused.trim_and_merge(elements(base), operand, *given, out)

        result = Unrounded(base.shape, make, held)
        return result if unrounded_allowed() else result.computed()

    @property
    def _divisor(self) -> float:
        """Of the sum where no sign is elected."""
        share = sum(self.weights)
        return share if self.normalize and abs(share) >= 1e-8 else 1.0

    def _combined(self, deltas: Sequence[Tensor]) -> Tensor:
        pairs = zip(deltas, self.weights, strict=True)
        scaled = [d if w == 1.0 else d * w for d, w in pairs]
        if self.elect is not None:
            votes = [d if v == 1.0 else d * v for d, v in zip(deltas, self._votes, strict=True)]
            return self._agreed(scaled, votes)
        result = scaled[0].clone() if scaled[0] is deltas[0] else scaled[0]
        for part in scaled[1:]:
            result += part
        return result / self._divisor

    def _agreed(self, scaled: Sequence[Tensor], votes: Sequence[Tensor]) -> Tensor:
        # Signs and masks are 0/1 floats: torch is several times slower on bool tensors.
        elected = sum(votes[1:], start=votes[0]).ge(0).to(votes[0].dtype).mul_(2).sub_(1)
        result, share = torch.zeros_like(elected), torch.zeros_like(elected)
        for part, vote, weight in zip(scaled, votes, self.weights, strict=True):
            agrees = vote.sign().mul_(elected).clamp_(min=0)
            result.addcmul_(part, agrees)
            share.add_(agrees, alpha=weight)
        if self.normalize:
            share.clamp_(min=self.least)
            result /= share.masked_fill_(share == 0, 1.0)
        return result
