"""The fused loops that draw by position.

As in `distmerge.methods.kernels`, each has a plain torch spelling beside its caller which gives
the same bits; the numbers drawn are those of `distmerge.methods.random`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from distmerge.methods.blocks import CHUNK
from distmerge.methods.chunks import chunk
from distmerge.methods.mark_kernels import PLANE, pack

Array = np.ndarray[Any, Any]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

_loop = njit(nogil=True, cache=True)


@_loop
def _number(z: Any) -> Any:
    """The 24 bits that a stream's state gives. The last of SplitMix64's three mixing steps is left
    out, as it changes none of them."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return np.int32(z >> np.uint64(40))


@_loop
def _uniform(number: Any) -> Any:
    return np.float32(number) * np.float32(2.0**-24)


@_loop
def number_at(stream: Any, step: Any) -> Any:
    """The uniform number after so many steps: one more than its position."""
    return _uniform(_number(stream + step * _GOLDEN))


@_loop
def keep_at_random(x: Any, stream: Any, first: int, keep: Any, out: Array) -> None:
    """`x` where the uniform number of its position is below `keep`, zero elsewhere."""
    scratch = np.empty(CHUNK, np.float32)
    for start in range(0, out.size, CHUNK):
        begin = np.uint64(first) + np.uint64(start) + np.uint64(1)
        _keep_below(chunk(x, start, scratch), stream, begin, keep, out[start : start + CHUNK])


@_loop
def _keep_below(x: Array, stream: Any, begin: Any, keep: Any, out: Array) -> None:
    # Here and below, a state is the one before plus a step: to multiply 64 bits takes AVX2 eight
    # instructions.
    state = stream + begin * _GOLDEN
    for i in range(x.size):
        drawn = _uniform(_number(state))
        out[i] = x[i] * (np.float32(1.0) if drawn < keep else np.float32(0.0))
        state += _GOLDEN


@_loop
def draw(stream: Any, begin: Any, out: Array) -> None:
    """The uniform numbers after `begin` steps, one more, and so on."""
    state = stream + begin * _GOLDEN
    for i in range(out.size):
        out[i] = _uniform(_number(state))
        state += _GOLDEN


@_loop
def mark_at_random(stream: Any, first: int, keep: Any, size: int, bits: Array) -> None:
    """Mark those of `size` positions whose uniform number is below `keep`."""
    marks = np.empty(CHUNK, np.uint8)
    # Numbers are multiples of 2**-24, so that so many of them are below `keep`.
    limit = np.int32(np.ceil(np.float64(keep) * 2.0**24))
    for start in range(0, size, CHUNK):
        begin = np.uint64(first) + np.uint64(start) + np.uint64(1)
        width = min(CHUNK, size - start)
        _mark_below(stream, begin, limit, marks[:width])
        marks[width:] = np.uint8(0)
        pack(marks, bits[start // 8 : start // 8 + PLANE])


@_loop
def _mark_below(stream: Any, begin: Any, limit: Any, marks: Array) -> None:
    state = stream + begin * _GOLDEN
    for i in range(marks.size):
        marks[i] = np.uint8(_number(state) < limit)
        state += _GOLDEN
