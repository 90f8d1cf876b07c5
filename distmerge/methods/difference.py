"""A task vector that the fused loops make of what was read, a chunk at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """Model minus base, not computed yet. Both are float32, or both bfloat16, in main memory and of
    one shape; the loops subtract in float32 what they have in the cache anyway."""

    model: Tensor
    base: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements, once they are computed."""
        return torch.float32

    @property
    def shape(self) -> torch.Size:
        """Of both."""
        return self.model.shape


Operand = Tensor | Difference
"""What questions are asked about."""


def computed(x: Operand) -> Tensor:
    """It as a tensor."""
    if isinstance(x, Tensor):
        return x
    return x.model.float() - x.base.float()
