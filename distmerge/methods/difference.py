"""Task vectors that the fused loops make of what was read, a chunk at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
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


Bits = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Thinned:
    """A task vector, zero where it isn't marked; the loops multiply what they have in the cache."""

    delta: Difference
    bits: Bits
    """A bit for each element: see `distmerge.methods.mark_kernels`."""
    first: int = 0
    """The place of the first element among the bits."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements, once they are computed."""
        return torch.float32

    @property
    def shape(self) -> torch.Size:
        """Of what is thinned."""
        return self.delta.shape


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """Element by element, how far tensors are apart: see `distmerge.methods.sce`."""

    rows: Any
    """The tensors as loops take rows of them."""
    held: Any
    """What has to live as long, as loops are given no more than its addresses."""
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements, once they are computed."""
        return torch.float32


Unmade = Difference | Thinned | Spread
Operand = Tensor | Unmade
"""What questions are asked about."""


def computed(x: Operand) -> Tensor:
    """It as a tensor."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, Difference):
        return x.model.float() - x.base.float()
    from distmerge.methods.operands import made  # which loads the loops: there are some

    return made(x)


Of = TypeVar("Of", bound=Operand)


def runs_of(x: Of, size: int) -> list[Of]:
    """All of its elements in row-major order, so many at a time."""
    elements = x.shape.numel()
    if elements <= size:
        return [x]
    whole = computed(x) if isinstance(x, Spread) else x
    runs: list[Any] = [_run_of(whole, start, start + size) for start in range(0, elements, size)]
    return runs


def _run_of(x: Operand, start: int, stop: int) -> Operand:
    if isinstance(x, Thinned):
        return Thinned(_between(x.delta, start, stop), x.bits, x.first + start)
    if isinstance(x, Difference):
        return _between(x, start, stop)
    assert isinstance(x, Tensor)
    return x.reshape(-1)[start:stop]


def _between(x: Difference, start: int, stop: int) -> Difference:
    return Difference(x.model.reshape(-1)[start:stop], x.base.reshape(-1)[start:stop])
