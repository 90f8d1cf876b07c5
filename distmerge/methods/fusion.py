"""Which of a loop's two spellings runs: the fused one, or plain torch."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmerge.methods.difference import Operand

SWITCH = "DISTMERGE_KERNELS"
"""Environment variable; `torch` turns the fused loops off."""


@functools.cache
def fused_loops() -> ModuleType | None:
    """The module of fused loops; None without numba, or if they are switched off."""
    if os.environ.get(SWITCH) == "torch":
        return None
    try:
        from distmerge.methods import kernels
    except ImportError:
        return None
    return kernels


def fused_for(*operands: Operand) -> ModuleType | None:
    """The fused loops, if they can work on these: float32 in main memory, or task vectors that they
    make themselves."""
    return fused_loops() if all(map(_fits, operands)) else None


def _fits(x: Operand) -> bool:
    if not isinstance(x, Tensor):
        return True
    return x.dtype == torch.float32 and x.is_cpu


def flat(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor's elements in row-major order, as numpy sees them."""
    return flat_tensor(tensor).numpy()


def flat_tensor(tensor: Tensor) -> Tensor:
    """A tensor's elements in row-major order, without a history. Blocks mostly lie so, and are
    many: a step that isn't needed isn't done."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return tensor if tensor.dim() == 1 else tensor.reshape(-1)
