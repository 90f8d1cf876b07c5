"""The fused loops that round results to bfloat16 and look at what that changes.

As in `distmerge.methods.kernels`, each has a plain torch spelling beside its caller which gives
the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from distmerge.methods.blocks import CHUNK
from distmerge.methods.chunks import wide
from distmerge.methods.unrounded import FINITE

Array = np.ndarray[Any, Any]

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)

_loop = njit(nogil=True, cache=True)


@_loop
def round_to_bfloat16(bits: Array, out: Array) -> bool:
    """Round float32 bits to bfloat16 bits, to nearest, ties to even. Is every result finite?"""
    return bool(_round(bits, out) < FINITE)


@_loop
def _round(bits: Array, out: Array) -> Any:
    """The largest magnitude's bits, before it is rounded."""
    largest = np.int32(0)
    for i in range(bits.size):
        rounded, magnitude = _rounded(bits[i])
        out[i] = rounded
        largest = max(largest, magnitude)
    return largest


@_loop
def round_and_count(bits: Array, out: Array, base: Array) -> tuple[bool, int, int]:
    """`round_to_bfloat16`, and how many float32 results differ from the base, and how many of these
    don't once they are rounded. Zeros are equal whatever their sign."""
    tally = np.zeros(3, np.int64)
    values = bits.view(np.float32)
    for start in range(0, bits.size, CHUNK):
        put(values[start : start + CHUNK], start, (out, base, tally))
    return bool(tally[0] < FINITE), int(tally[1]), int(tally[2])


@_loop
def _round_and_count(exact: Array, out: Array, base: Array) -> tuple[Any, Any, Any]:
    bits = exact.view(np.int32)
    largest, changed, lost = np.int32(0), np.int32(0), np.int32(0)
    for i in range(bits.size):
        rounded, magnitude = _rounded(bits[i])
        out[i] = rounded
        largest = max(largest, magnitude)
        old = wide(base[i])
        differs = np.int32(exact[i] != old)
        changed = np.int32(changed + differs)
        lost = np.int32(lost + np.int32(differs & np.int32(wide(rounded) == old)))
    return largest, changed, lost


def room(out: Any, start: int, scratch: Array) -> Array:
    """Where to put a chunk of a result: where it stays if that is float32, else a scratch."""
    raise NotImplementedError  # numba compiles `_room` in its place


@overload(room)
def _room(out: Any, start: Any, scratch: Any) -> Any:
    def apart(out: Any, start: Any, scratch: Any) -> Any:
        return scratch[: min(scratch.size, out[0].size - start)]

    def in_place(out: Any, start: Any, scratch: Any) -> Any:
        return out[start : start + scratch.size]

    return apart if isinstance(out, types.BaseTuple) else in_place


def put(values: Array, start: int, out: Any) -> None:
    """Take a chunk of a result that `room` had been asked for.

    out: a float32 array, which has it already; or bfloat16 bits, and three numbers that tell of all
    chunks: the bits of the largest magnitude, how many values differ from the base's bits between
    the two, if there are any, and how many of these don't once they are rounded.
    """
    raise NotImplementedError  # numba compiles `_put` in its place


@overload(put)
def _put(values: Any, start: Any, out: Any) -> Any:
    def counted(values: Any, start: Any, out: Any) -> Any:
        written = out[0][start : start + values.size]
        before = out[1][start : start + values.size]
        largest, changed, lost = _round_and_count(values, written, before)
        out[2][0] = max(out[2][0], np.int64(largest))
        out[2][1] += np.int64(changed)
        out[2][2] += np.int64(lost)

    def rounded(values: Any, start: Any, out: Any) -> Any:
        largest = _round(values.view(np.int32), out[0][start : start + values.size])
        out[1][0] = max(out[1][0], np.int64(largest))

    def is_there(values: Any, start: Any, out: Any) -> Any:
        pass

    if not isinstance(out, types.BaseTuple):
        return is_there
    return counted if len(out) == 3 else rounded


@_loop
def _rounded(b: Any) -> tuple[Any, Any]:
    """The bfloat16 bits of float32 bits, and the magnitude's bits before."""
    magnitude = np.int32(b & _MAGNITUDE)
    odd = np.int32(np.int32(b >> np.int32(16)) & np.int32(1))
    nearest = np.uint32(np.uint32(np.int32(b + np.int32(0x7FFF) + odd)) >> np.uint32(16))
    return np.uint16(nearest if magnitude <= _INFINITY else np.uint32(0x7FC0)), magnitude
