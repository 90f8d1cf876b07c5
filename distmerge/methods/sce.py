"""SCE: select, calculate, erase. The one method whose weights come from what it selects."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from distmerge.methods.bands import trim
from distmerge.methods.consensus import Consensus
from distmerge.methods.cutoff import cutoff
from distmerge.methods.fusion import flat, fused_for
from distmerge.methods.linear import Answers
from distmerge.methods.operands import differences
from distmerge.methods.reductions import mean_square
from distmerge.methods.signature import describe

LEAST = 1e-6
"""Sums of weights below this don't divide."""


def spread(xs: list[Tensor]) -> Tensor:
    """Element by element, the sum of squared differences from the mean: exactly zero where all
    are equal, and in the order of the variances."""
    fused = fused_for(*xs)
    if fused is not None:
        out = torch.empty(xs[0].shape)
        fused.spread(torch.stack([x.reshape(-1) for x in xs]).numpy(), flat(out))
        return out
    apart = [x - xs[0] for x in xs[1:]]
    squares, total = torch.zeros_like(xs[0]), torch.zeros_like(xs[0])
    for x in apart:
        total += x
        squares += x * x
    return squares - total * total * (1.0 / len(xs))


def keep_where(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where `mask` is not zero, zero elsewhere."""
    fused = fused_for(x, mask)
    if fused is None:
        return torch.where(mask != 0, x, 0.0)
    out = torch.empty(x.shape)
    fused.keep_where(flat(x), flat(mask), flat(out))
    return out


def _sce(
    models: list[Tensor],
    base: Tensor,
    *,
    select_topk: Annotated[float, Field(ge=0, le=1)] = 1.0,
) -> Answers:
    """Select the entries of the task vectors in which the models differ most, calculate each
    model's weight from the energy of what it has there, erase what disagrees with the elected sign.

    Wan et al., "FuseChat: Knowledge fusion of chat models", 2024, arXiv:2408.07990. Entries are
    selected by their variance over the models: the share `select_topk` of those that vary at all.
    A weight is the mean square of the model's entries, divided by the sum of these; they are equal
    where that is next to zero.
    """
    deltas = differences(models, base)
    if select_topk < 1.0:
        varies = spread(deltas)
        cut = yield cutoff(varies, keep=select_topk, nonzero=True)
        selected = trim(varies, cut)
        deltas = [keep_where(delta, selected) for delta in deltas]
    energies = yield [mean_square(delta) for delta in deltas]
    whole = sum(energies)
    weights = [e / whole for e in energies] if whole >= LEAST else [1.0 / len(models)] * len(models)
    return Consensus(weights, "paper", normalize=True, least=LEAST).merge(base, deltas)


sce = describe(_sce, name="sce", blocks="elements", raw=True, builtin=True)
