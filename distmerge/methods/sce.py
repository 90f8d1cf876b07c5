"""SCE: select, calculate, erase. The one method whose weights come from what it selects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distmerge.methods.consensus import Consensus
from distmerge.methods.cutoff import Cut, cutoff
from distmerge.methods.difference import Bits, Difference, Operand, Spread, Thinned, computed
from distmerge.methods.fusion import fused_for
from distmerge.methods.linear import Answers
from distmerge.methods.operands import elements, rows, task_vectors
from distmerge.methods.random import Draw
from distmerge.methods.reductions import mean_square
from distmerge.methods.sparsify import room_for_marks
from distmerge.methods.task_vectors import declared
from distmerge.methods.trim import edges, trim

LEAST = 1e-6
"""Sums of weights below this don't divide."""


def spread(xs: Sequence[Operand]) -> Operand:
    """Element by element, the sum of squared differences from the mean: exactly zero where all
    are equal, and in the order of the variances."""
    if fused_for(*xs) is not None:
        return Spread(*rows(xs), xs[0].shape)
    first, *others = map(computed, xs)
    squares, total = torch.zeros_like(first), torch.zeros_like(first)
    for x in others:
        apart = x - first
        total += apart
        squares += apart * apart
    return squares - total * total * (1.0 / len(xs))


def selected(deltas: Sequence[Operand], varies: Operand, cut: Cut, rng: Draw) -> Sequence[Operand]:
    """The entries where what varies reaches the cut; others times zero."""
    fused = fused_for(varies, *deltas)
    if fused is None or not all(isinstance(delta, Difference) for delta in deltas):
        kept = trim(computed(varies), cut) != 0
        return [computed(delta) * kept for delta in deltas]

    def mark() -> Bits:
        bits, found = room_for_marks(varies), edges(cut)
        bounds = np.array(found.bounds, np.float32)
        fused.mark_between(elements(varies), bounds, found.stream, found.first, bits)
        return bits

    bits = rng.marks((cut.value, cut.share), mark)
    return [Thinned(delta, bits) for delta in deltas if isinstance(delta, Difference)]


def _sce(
    models: list[Tensor],
    base: Tensor,
    *,
    rng: Draw,
    select_topk: Annotated[float, Field(ge=0, le=1)] = 1.0,
) -> Answers:
    """Select the entries of the task vectors in which the models differ most, calculate each
    model's weight from the energy of what it has there, erase what disagrees with the elected sign.

    Wan et al., "FuseChat: Knowledge fusion of chat models", 2024, arXiv:2408.07990. Entries are
    selected by their variance over the models: the share `select_topk` of those that vary at all.
    A weight is the mean square of the model's entries, divided by the sum of these; they are equal
    where that is next to zero.
    """
    deltas = task_vectors(models, base)
    if select_topk < 1.0:
        varies = spread(deltas)
        cut = yield cutoff(varies, keep=select_topk, nonzero=True)
        deltas = selected(deltas, varies, cut, rng)
    energies = yield [mean_square(delta) for delta in deltas]
    whole = sum(energies)
    weights = [e / whole for e in energies] if whole >= LEAST else [1.0 / len(models)] * len(models)
    return Consensus(weights, "paper", normalize=True, least=LEAST).merge(base, deltas)


sce = declared(_sce, seamless=True)
