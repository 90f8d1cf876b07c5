"""Merging agents: task vectors of reinforcement learning are sparse and overlap little, so that a
plain mean would dilute what only one of them changed."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from distmerge.methods.linear import Answers
from distmerge.methods.reductions import Scope, total
from distmerge.methods.signature import describe

Positive = Annotated[float, Field(ge=0)]


def changes(
    models: list[Tensor], base: Tensor, epsilon: float
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Task vectors without entries up to `epsilon`; where they are left, as 0/1; how many of them
    are left at each entry."""
    deltas = [model - base for model in models]
    left = [torch.nn.functional.hardshrink(delta, epsilon) for delta in deltas]
    changed = [delta.sign().abs_() for delta in left]
    return left, changed, sum(changed[1:], start=changed[0])


def _ram(models: list[Tensor], base: Tensor, *, epsilon: Positive = 1e-5) -> Tensor:
    """base + the mean, at every entry, of the task vectors that change it by more than `epsilon`.

    Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models", 2026, arXiv:2601.13572.
    """
    deltas, _, count = changes(models, base, epsilon)
    return base + sum(deltas[1:], start=deltas[0]) / count.clamp(min=1.0)


def _ramplus_tl(
    models: list[Tensor],
    base: Tensor,
    *,
    r: float = 0.1,
    alpha: Positive = 0.2,
    epsilon: Positive = 1e-5,
    over: Scope = "tensor",
) -> Answers:
    """ram, with what only one model changes multiplied by 1 + r * min(shared / unique, alpha):
    of the entries that this model changes, how many others change too, and how many they don't.

    RAM+ of the same paper, for each tensor apart; with `over: model` the entries of the whole model
    are counted.
    """
    deltas, changed, count = changes(models, base, epsilon)
    alone = count.eq(1.0).to(base.dtype)
    counts = yield [total(x, over=over) for mask in changed for x in (mask, mask * alone)]
    merged = sum(deltas[1:], start=deltas[0]) / count.clamp(min=1.0)
    for delta, all_changed, unique in zip(deltas, counts[::2], counts[1::2], strict=True):
        ratio = min((all_changed - unique) / max(unique, epsilon, 1.0), alpha)
        merged = merged + r * ratio * (delta * alone)
    return base + merged


ram = describe(_ram, name="ram", blocks="elements", builtin=True)
ramplus_tl = describe(_ramplus_tl, name="ramplus_tl", blocks="elements", builtin=True)
