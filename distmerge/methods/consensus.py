"""How sparse task vectors become one: a weighted sum, or the mean of those that agree in sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distmerge.methods.bands import BandCut, edges, trim
from distmerge.methods.cutoff import EVERYTHING, Cut
from distmerge.methods.fusion import flat, fused_for
from distmerge.methods.operands import stacked, widened

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

    def merge(self, base: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """base + scale * combination of the task vectors `kept`."""
        fused = fused_for(*kept)
        if fused is None or self.elect is None:
            return base + self._combined(kept) * self.scale
        return self._fused(fused, base, kept, [EVERYTHING] * len(kept))

    def trim_and_merge(
        self, base: Tensor, deltas: Sequence[Tensor], cuts: Sequence[Cut | BandCut]
    ) -> Tensor:
        """base + scale * combination of the task vectors, trimmed."""
        fused = fused_for(*deltas)
        if fused is None or self.elect is None:
            return self.merge(base, [trim(d, cut) for d, cut in zip(deltas, cuts, strict=True)])
        return self._fused(fused, base, deltas, cuts)

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
        deltas: Sequence[Tensor],
        cuts: Sequence[Cut | BandCut],
    ) -> Tensor:
        trims = [edges(cut) for cut in cuts]
        out = torch.empty(base.shape)
        fused.elect_and_merge(
            flat(widened(base)),
            stacked(deltas).numpy(),
            np.array([trim.bounds for trim in trims], np.float32),
            np.array([trim.stream for trim in trims], np.uint64),
            np.array([trim.first for trim in trims], np.int64),
            np.array(self.weights, np.float32),
            np.array(self._votes, np.float32),
            self.normalize,
            np.float32(self.least),
            np.float32(self.scale),
            flat(out),
        )
        return out

    def _combined(self, deltas: Sequence[Tensor]) -> Tensor:
        pairs = zip(deltas, self.weights, strict=True)
        scaled = [d if w == 1.0 else d * w for d, w in pairs]
        if self.elect is not None:
            votes = [d if v == 1.0 else d * v for d, v in zip(deltas, self._votes, strict=True)]
            return self._agreed(scaled, votes)
        result = scaled[0].clone() if scaled[0] is deltas[0] else scaled[0]
        for part in scaled[1:]:
            result += part
        share = sum(self.weights)
        return result / share if self.normalize and abs(share) >= 1e-8 else result

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
