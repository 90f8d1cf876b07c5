"""The fused loops that read bfloat16 as it lies in a file.

Widening a block first, as `x.float()` does, writes and reads twice the bytes that the file holds;
here it is a shift in a register. Otherwise as in `distmerge.methods.kernels`: each loop has a plain
torch spelling beside its caller, and gives the same bits as it.

Arrays called `bits` are the uint16 view of bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from distmerge.methods.blocks import CHUNK
from distmerge.methods.chunks import array_at, difference, wide

__all__ = ["difference", "weighted_sum"]

Array = np.ndarray[Any, Any]

_loop = njit(nogil=True, cache=True)


@_loop
def weighted_sum(addresses: Array, weights: Array, like: Array, out: Array) -> None:
    """The sum of the arrays that lie at these addresses, times their weights, from the first to
    the last; every product is rounded before it is added."""
    for start in range(0, out.size, CHUNK):
        part = out[start : start + CHUNK]
        for m in range(weights.size):
            bits = array_at(addresses[m], out.size, like)[start : start + part.size]
            if m == 0:
                _scale(bits, weights[m], part)
            else:
                _add_scaled(bits, weights[m], part)


@_loop
def _scale(bits: Array, factor: Any, out: Array) -> None:
    for i in range(out.size):
        out[i] = wide(bits[i]) * factor


@_loop
def _add_scaled(bits: Array, factor: Any, out: Array) -> None:
    for i in range(out.size):
        out[i] += wide(bits[i]) * factor
