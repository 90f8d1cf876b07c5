"""DELLA: entries dropped at random, the smaller of a row the likelier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distmerge.methods.blocks import Granularity
from distmerge.methods.consensus import Consensus, SignWeighting
from distmerge.methods.difference import computed
from distmerge.methods.linear import Answers
from distmerge.methods.method import PerModel
from distmerge.methods.operands import differences, task_vectors
from distmerge.methods.random import Draw
from distmerge.methods.sparsify import Rescale, chances, check_chances, keep_by_rank, rescaled
from distmerge.methods.task_vectors import Density, Share, declared


def _ranked(
    models: list[Tensor],
    base: Tensor,
    consensus: Consensus,
    density: Sequence[float],
    epsilon: Sequence[float],
    rng: Draw,
    rescale: Rescale,
) -> Answers:
    chosen = list(enumerate(zip(density, epsilon, strict=True)))
    if rescale == "density":
        whole = differences(models, base)
        entries = [keep_by_rank(whole[i], *one, rng, i) for i, one in chosen]
        for i, (keep, spread) in chosen:
            if 0.0 < keep < 1.0:
                chance = chances(whole[i], keep, spread).to(whole[i].dtype)
                entries[i] = computed(entries[i]) / chance
        return consensus.merge(base, entries)
    deltas = task_vectors(models, base)
    kept = [keep_by_rank(deltas[i], *one, rng, i) for i, one in chosen]
    return consensus.merge(base, *(yield from rescaled(deltas, kept, rescale, density)))


def _della_linear(
    models: list[Tensor],
    base: Tensor,
    *,
    rng: Draw,
    weight: PerModel[float],
    density: Density = 1.0,  # type: ignore[assignment]
    epsilon: PerModel[Share] = 0.15,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: Rescale = True,
    lambda_: float = 1.0,
) -> Answers:
    """Drop entries of the task vectors at random, the smaller the likelier, rescale what is left,
    add up.

    Deep, Bhardwaj and Poria, "DELLA-Merging: Reducing interference in model merging through
    magnitude-based sampling", 2024, arXiv:2406.11617. Within a row, the chance to be kept rises by
    rank of magnitude from `density - epsilon` to `density + epsilon`. `rescale: density` divides
    each entry by its own chance, as in the paper; `true` restores each tensor's L1 norm.
    """
    consensus = Consensus(weight, None, normalize, lambda_)
    return (yield from _ranked(models, base, consensus, density, epsilon, rng, rescale))


def _della(
    models: list[Tensor],
    base: Tensor,
    *,
    rng: Draw,
    weight: PerModel[float],
    density: Density = 1.0,  # type: ignore[assignment]
    epsilon: PerModel[Share] = 0.15,  # type: ignore[assignment]
    normalize: bool = True,
    rescale: Rescale = True,
    lambda_: float = 1.0,
    sign_weighting: SignWeighting = "weighted",
) -> Answers:
    """della_linear's task vectors, of which only what agrees with the elected sign is averaged."""
    consensus = Consensus(weight, sign_weighting, normalize, lambda_)
    return (yield from _ranked(models, base, consensus, density, epsilon, rng, rescale))


def _rows(parameters: Mapping[str, Any], shape: tuple[int, ...]) -> Granularity:
    """Ranks are those within a row. What is wrong with the chances shows when this is planned."""
    for keep, spread in zip(
        parameters.get("density", ()), parameters.get("epsilon", ()), strict=True
    ):
        check_chances(keep, spread)
    return "rows"


della = declared(_della, blocks=_rows, seamless=True)
della_linear = declared(_della_linear, blocks=_rows, seamless=True)
