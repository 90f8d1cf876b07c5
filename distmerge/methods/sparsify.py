"""How task vectors are thinned out at random, and what is left scaled up again.

Those that look at magnitudes alone are in `distmerge.methods.cutoff` and `distmerge.methods.bands`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distmerge.errors import ParameterError
from distmerge.methods.blocks import CHUNK
from distmerge.methods.difference import Bits, Difference, Operand, Thinned, computed
from distmerge.methods.fusion import flat, fused_for
from distmerge.methods.operands import elements
from distmerge.methods.random import Draw
from distmerge.methods.reductions import Norms

Rescale = bool | Literal["l1", "density"]
"""Whether the L1 norm is restored after sparsifying, or the kept share divided out."""

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def keep_at_random(delta: Operand, keep: float, rng: Draw, model: int) -> Operand:
    """Each entry with probability `keep`, else zero."""
    if keep >= 1.0:
        return delta
    fused = fused_for(delta)
    if fused is None:
        whole = computed(delta)
        return whole * (rng.uniform(whole, model) < keep)
    if isinstance(delta, Difference):

        def mark() -> Bits:
            bits = room_for_marks(delta)
            stream, size = np.uint64(rng.stream(model)), delta.shape.numel()
            fused.mark_at_random(stream, rng.start, np.float32(keep), size, bits)
            return bits

        return Thinned(delta, rng.marks((model, keep), mark))
    out = torch.empty(delta.shape)
    stream = np.uint64(rng.stream(model))
    fused.keep_at_random(elements(delta), stream, rng.start, np.float32(keep), flat(out))
    return out


def room_for_marks(x: Operand) -> Bits:
    """Room for the marks of so many elements."""
    return np.empty(-(-x.shape.numel() // CHUNK) * CHUNK // 8, np.uint8)


def check_chances(keep: float, spread: float) -> None:
    """Refuse chances that leave 0 to 1. Everything and nothing have no chances.

    Raises
        ParameterError: keep - spread or keep + spread is no probability.
    """
    if 0.0 < keep < 1.0 and not 0.0 < keep - spread <= keep + spread < 1.0:
        raise ParameterError(
            f"density {keep} and epsilon {spread} give chances outside of 0 to 1.",
            f"density - epsilon is {keep - spread:.4g}, density + epsilon {keep + spread:.4g}",
            fix=f"epsilon: {min(keep, 1.0 - keep) / 2:.2g}",
        )


def chances(delta: Tensor, keep: float, spread: float) -> Tensor:
    """The probability with which each entry is kept, in float64: keep - spread for the smallest
    magnitude of its row to keep + spread for the largest, evenly by rank.

    Equals share the mean of their ranks, so a row of equals, or of one, is kept with `keep`.
    """
    rows = delta.abs().reshape(-1, delta.shape[-1] if delta.dim() else 1)
    bits = rows.contiguous().view(_BITS[delta.dtype])  # magnitudes order as their bits do
    in_order = bits.sort(dim=1).values
    twice = torch.searchsorted(in_order, bits) + torch.searchsorted(in_order, bits, right=True) - 1
    least, step = _line(rows.shape[1], keep, spread)
    return (twice.double() * step + least).view(delta.shape)


def _line(width: int, keep: float, spread: float) -> tuple[float, float]:
    """Chances by twice the rank, in rows of this width: at zero, and what each adds."""
    return (keep - spread, spread / (width - 1)) if width > 1 else (keep, 0.0)


def keep_by_rank(delta: Operand, keep: float, spread: float, rng: Draw, model: int) -> Operand:
    """Each entry with its own one of the `chances`, else zero. Blocks are whole rows."""
    if keep >= 1.0 or not delta.shape.numel():
        return delta
    if keep <= 0.0:
        return torch.zeros_like(computed(delta))
    fused = fused_for(delta)
    if fused is None:
        whole = computed(delta)
        return whole * (rng.uniform(whole, model) < chances(whole, keep, spread).float())
    width = delta.shape[-1] if delta.shape else 1
    given = width, np.uint64(rng.stream(model)), rng.start, *_line(width, keep, spread)
    if isinstance(delta, Difference):

        def mark() -> Bits:
            bits = room_for_marks(delta)
            fused.mark_by_rank(elements(delta), *given, bits)
            return bits

        return Thinned(delta, rng.marks((model, keep, spread), mark))
    out = torch.empty(delta.shape)
    fused.keep_by_rank(elements(delta), *given, flat(out))
    return out


def rescaled(
    deltas: Sequence[Operand], kept: Sequence[Operand], rescale: Rescale, density: Sequence[float]
) -> Generator[Any, Any, tuple[Sequence[Operand], list[float]]]:
    """What sparsifying left, and what each has still to be multiplied with to have the L1 norm it
    had before; or divided by the kept share."""
    ones = [1.0] * len(kept)
    if rescale == "density":
        pairs = zip(kept, density, strict=True)
        return [k if d in (0.0, 1.0) else computed(k) / d for k, d in pairs], ones
    if not rescale:
        return kept, ones
    norms = yield [Norms(*pair) for pair in zip(deltas, kept, strict=True)]
    return kept, [_ratio(*pair) for pair in norms]


def _ratio(before: float, after: float) -> float:
    """Of the norms, unless either is next to zero."""
    return 1.0 if before < 1e-7 or after < 1e-7 else before / after
