"""Methods that take over from one other model the entries that are worth it."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from distmerge.methods.linear import Answers
from distmerge.methods.quantile import quantiles
from distmerge.methods.signature import describe


def _nearswap(models: list[Tensor], base: Tensor, *, t: Annotated[float, Field(ge=0)]) -> Tensor:
    """Each entry goes to the other model's where that is at most `t` away, else `t` towards it.

    alchemonaut, in the model card of QuartetAnemoi-70B-t0.0001, 2024.
    """
    other = models[0]
    share = (t / (base - other).abs().clamp(min=1e-6)).clamp(max=1.0)
    return share * other + (1.0 - share) * base


def importance(model: Tensor, base: Tensor) -> Tensor:
    """Each entry's change, times the divergence KL(softmax(model) || softmax(base)) of its row.

    Entries that are no finite numbers count as zero in the divergence.
    """
    p, q = (torch.softmax(_finite(x), -1) + 1e-8 for x in (model, base))
    divergence = (p * torch.log(p / q)).sum(-1, keepdim=True)
    return (model - base).abs() * divergence


def _arcee_fusion(models: list[Tensor], base: Tensor) -> Answers:
    """Take over the other model's entries whose importance stands out: median + 1.5 * (third
    quartile - first quartile) of the tensor's importances, or more.

    Arcee Fusion, as in mergekit. See `importance`; quartiles are of all entries, exactly.
    """
    other = models[0]
    found = importance(other, base)
    quartiles = yield quantiles(found, [0.25, 0.5, 0.75])
    first, median, third = torch.tensor(quartiles, dtype=found.dtype, device=found.device)
    # What is no number is not below the threshold, so it goes into the result.
    return torch.where(found < median + 1.5 * (third - first), base, base + (other - base))


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


nearswap = describe(_nearswap, name="nearswap", blocks="elements", models=(1, 1), builtin=True)
arcee_fusion = describe(
    _arcee_fusion, name="arcee_fusion", blocks="rows", models=(1, 1), builtin=True
)
