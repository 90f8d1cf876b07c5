"""What a cut, or a band between two, leaves of a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmerge.methods.bands import BandCut
from distmerge.methods.cutoff import NOTHING, Cut
from distmerge.methods.fusion import flat, fused_for
from distmerge.methods.random import Draw


def keep_above(x: Tensor, cut: Cut) -> Tensor:
    """`x` with everything below the cut set to zero."""
    if cut.value == math.inf:
        return torch.zeros_like(x)
    if cut.value == 0.0 and cut.share == 1.0:
        return x
    if cut.single and x.dtype == torch.float64:
        return torch.where(keep_above(x.float(), cut) == 0, 0.0, x)
    x = x.contiguous()
    threshold = plain_threshold(cut, x.dtype)
    if threshold is not None:
        return torch.nn.functional.hardshrink(x, threshold)
    assert cut.draw is not None, "the evaluator gives every answer its draw"
    kept = torch.nn.functional.hardshrink(x, cut.value)
    target, source = kept.view(-1), x.view(-1)
    equals = torch.nonzero(source.abs() == cut.value).view(-1)
    chosen = equals[cut.draw.uniform_at(equals) < cut.share]
    target[chosen] = source[chosen]
    return kept


def keep_band(x: Tensor, cut: BandCut) -> Tensor:
    """`x` with everything outside the band set to zero. What is not finite stays so."""
    return keep_above(x, cut.lower) - keep_above(x, cut.upper)


def trim(x: Tensor, cut: Cut | BandCut) -> Tensor:
    """`keep_above` or `keep_band`."""
    fused = fused_for(x)
    if fused is None:
        return keep_above(x, cut) if isinstance(cut, Cut) else keep_band(x, cut)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    found = edges(cut)
    bounds = np.array(found.bounds, np.float32)
    fused.keep_between(flat(x), bounds, found.stream, found.first, flat(out))
    return out


@dataclass(frozen=True, slots=True)
class Edges:
    """A cut as the fused loops take it."""

    bounds: tuple[float, float, float, float]
    """Kept is what exceeds the first magnitude, and of its equals the second's share; dropped is
    what exceeds the third, and of its equals the fourth's share."""
    stream: np.uint64
    """Of the draw among equals."""
    first: int
    """The position that the block begins at."""


def edges(cut: Cut | BandCut) -> Edges:
    """Where a cut lies."""
    lower, upper = (cut, NOTHING) if isinstance(cut, Cut) else (cut.lower, cut.upper)
    low, high = _edge(lower), _edge(upper)
    draw = lower.draw or Draw(0, (), 0)
    assert lower.draw or not (low[1] or high[1]), "the evaluator gives every answer its draw"
    return Edges((*low, *high), np.uint64(draw.stream()), draw.start)


def _edge(cut: Cut) -> tuple[float, float]:
    """A magnitude up to which everything is on the lower side, and the share of its equals that
    are on the upper side all the same."""
    threshold = plain_threshold(cut, torch.float32)
    if threshold is not None:
        return threshold, 0.0
    return cut.value, cut.share


def plain_threshold(cut: Cut, dtype: torch.dtype) -> float | None:
    """The magnitude up to which everything is dropped; None if a draw among equals decides."""
    if cut.share == 1.0:
        # The next smaller float, so that 'greater than' keeps what equals the cut.
        kind: Any = np.float32 if dtype == torch.float32 else np.float64
        return float(np.nextafter(kind(cut.value), kind(0))) if cut.value > 0.0 else -1.0
    return cut.value if cut.share == 0.0 or cut.value == 0.0 else None
