"""The fused loops that read bfloat16 as it lies in a file.

Widening a block first, as `x.float()` does, writes and reads twice the bytes that the file holds;
here it is a shift in a register. Otherwise as in `distmerge.methods.kernels`: each loop has a plain
torch spelling beside its caller, and all but the sums give the same bits as it.

Arrays called `bits` are the uint16 view of bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from distmerge.methods.kernels import LANES, in_order
from distmerge.methods.kernels import wide as _wide

Array = np.ndarray[Any, Any]

_loop = njit(nogil=True, cache=True)


@_loop
def difference(bits: Array, base: Array, out: Array) -> None:
    """`bits` minus `base`, in float32."""
    for i in range(out.size):
        out[i] = _wide(bits[i]) - _wide(base[i])


@_loop
def scaled(bits: Array, factor: Any, out: Array) -> None:
    """`bits` times a float32."""
    for i in range(out.size):
        out[i] = _wide(bits[i]) * factor


@_loop
def add_scaled(bits: Array, factor: Any, out: Array) -> None:
    """Add `bits` times a float32; the product is rounded before it is added."""
    for i in range(out.size):
        out[i] += _wide(bits[i]) * factor


@_loop
def dot(x: Array, y: Array) -> float:
    """Sum of products in float64, in the lanes of `distmerge.methods.kernels.dot`."""
    lanes = np.zeros(LANES, np.float64)
    for start in range(0, x.size, LANES):
        left, right = x[start : start + LANES], y[start : start + LANES]
        for j in range(left.size):
            lanes[j] += np.float64(_wide(left[j])) * np.float64(_wide(right[j]))
    return in_order(lanes)
