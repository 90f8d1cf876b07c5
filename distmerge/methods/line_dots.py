"""Dot products of the rows of two tensors, or of their columns: one number for each.

A row is the last dimension and lies inside a block, so its products are known at once; a column,
the first dimension, runs through all blocks, so they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmerge.methods.reductions import Scope

Line = np.ndarray[Any, Any]


def row_dot(x: Tensor, y: Tensor) -> Line:
    """Float64 products of the rows, the last dimension kept with size one."""
    return _dot(x, y, -1, keepdim=True)


@dataclass(frozen=True, slots=True)
class ColumnDot:
    """A question; see `column_dot`."""

    x: Tensor
    y: Tensor
    over: Scope = "tensor"
    exact: bool = False

    def partial(self, state: Any) -> Line:
        return _dot(self.x, self.y, 0, keepdim=False)

    def merge(self, a: Line, b: Line) -> Line:
        total: Line = a + b
        return total

    def finish(self, total: Line, state: Any) -> Line:
        return total

    def bare(self) -> ColumnDot:
        return replace(self, x=self.x.new_empty(0), y=self.y.new_empty(0))


def column_dot(x: Tensor, y: Tensor) -> ColumnDot:
    """Float64 products along the first dimension, as an array of the other dimensions' shape."""
    return ColumnDot(x, y)


def _dot(x: Tensor, y: Tensor, dim: int, *, keepdim: bool) -> Line:
    found = _products(x, y).sum(dim, keepdim=keepdim)
    if not bool(found.isfinite().all()):
        found = _products(_finite(x), _finite(y)).sum(dim, keepdim=keepdim)
    products: Line = found.cpu().numpy()
    return products


def _products(x: Tensor, y: Tensor) -> Tensor:
    """In float64, with one temporary."""
    return x.to(torch.float64, copy=True).mul_(y)


def _finite(x: Tensor) -> Tensor:
    """Non-finite values are kept out, as they are of all reductions."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
