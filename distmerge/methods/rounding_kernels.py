"""The fused loops that round results to bfloat16 and look at what that changes.

As in `distmerge.methods.kernels`, each has a plain torch spelling beside its caller which gives
the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from distmerge.methods.blocks import CHUNK
from distmerge.methods.chunks import wide

Array = np.ndarray[Any, Any]

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)

_loop = njit(nogil=True, cache=True)


@_loop
def round_to_bfloat16(bits: Array, out: Array) -> bool:
    """Round float32 bits to bfloat16 bits, to nearest, ties to even. Is every result finite?"""
    largest = np.int32(0)
    for i in range(bits.size):
        rounded, magnitude = _rounded(bits[i])
        out[i] = rounded
        largest = max(largest, magnitude)
    return bool(largest < np.int32(0x7F7F8000))


@_loop
def round_and_count(bits: Array, out: Array, base: Array) -> tuple[bool, int, int]:
    """`round_to_bfloat16`, and how many float32 results differ from the base, and how many of these
    don't once they are rounded. Zeros are equal whatever their sign."""
    values = bits.view(np.float32)
    largest, changed, lost = np.int32(0), np.int64(0), np.int64(0)
    for start in range(0, bits.size, CHUNK):
        part, exact = bits[start : start + CHUNK], values[start : start + CHUNK]
        written, before = out[start : start + CHUNK], base[start : start + CHUNK]
        differ, same = np.int32(0), np.int32(0)
        for i in range(part.size):
            rounded, magnitude = _rounded(part[i])
            written[i] = rounded
            largest = max(largest, magnitude)
            old = wide(before[i])
            differs = np.int32(exact[i] != old)
            differ = np.int32(differ + differs)
            same = np.int32(same + np.int32(differs & np.int32(wide(rounded) == old)))
        changed += differ
        lost += same
    return bool(largest < np.int32(0x7F7F8000)), int(changed), int(lost)


@_loop
def _rounded(b: Any) -> tuple[Any, Any]:
    """The bfloat16 bits of float32 bits, and the magnitude's bits before."""
    magnitude = np.int32(b & _MAGNITUDE)
    odd = np.int32(np.int32(b >> np.int32(16)) & np.int32(1))
    nearest = np.uint32(np.uint32(np.int32(b + np.int32(0x7FFF) + odd)) >> np.uint32(16))
    return np.uint16(nearest if magnitude <= _INFINITY else np.uint32(0x7FC0)), magnitude
