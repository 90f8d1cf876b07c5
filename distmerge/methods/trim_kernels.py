"""The fused loops that trim: what lies between two cuts is kept, and equals are drawn from.

As in `distmerge.methods.kernels`, each has a plain torch spelling beside its caller which gives
the same bits; the numbers drawn are those of `distmerge.methods.random`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from distmerge.methods.blocks import CHUNK
from distmerge.methods.chunks import chunk, length
from distmerge.methods.mark_kernels import PLANE, WORDS, pack, places_of
from distmerge.methods.random_kernels import draw, number_at

Array = np.ndarray[Any, Any]

MANY = CHUNK // 8
"""Equals in a chunk from which a number is drawn for every element: to look for them takes as long
with this many, and four times as long with three tenths."""

_loop = njit(nogil=True, cache=True)


@_loop
def keep_between(x: Array, bounds: Array, stream: Any, first: int, out: Array) -> None:
    """`x` where its magnitude exceeds `low` but not `high`, zero elsewhere.

    Of those that equal `low` the share `low_share` is kept, of those that equal `high` the share
    `high_share` is dropped, by the same draw. What is not finite stays so.

    bounds: low, low_share, high, high_share; float32. Infinite `low` drops everything.
    first: the position of x[0] in the stream.
    """
    scratch = new_scratch()
    for start in range(0, x.size, CHUNK):
        part, kept = x[start : start + CHUNK], out[start : start + CHUNK]
        keep_chunk(part, bounds, stream, first + start, scratch, kept)


@_loop
def mark_between(x: Any, bounds: Array, stream: Any, first: int, bits: Array) -> None:
    """Mark what `keep_between` keeps and is not zero."""
    scratch, values, kept = new_scratch(), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    marks = scratch[0]
    for start in range(0, length(x), CHUNK):
        part = chunk(x, start, values)
        keep_chunk(part, bounds, stream, first + start, scratch, kept[: part.size])
        _mark_nonzero(kept[: part.size], marks)
        pack(marks, bits[start // 8 : start // 8 + PLANE])


@_loop
def _mark_nonzero(kept: Array, marks: Array) -> None:
    for i in range(kept.size):
        marks[i] = np.uint8(kept[i] != np.float32(0.0))
    marks[kept.size :] = np.uint8(0)


@_loop
def new_scratch() -> tuple[Array, Array, Array, Array]:
    """Room for marks, for what `places_of` needs and for numbers drawn."""
    marks, hits = np.empty(CHUNK, np.uint8), np.empty(WORDS + 1, np.uint32)
    return marks, hits, np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.float32)


@_loop
def keep_chunk(x: Array, bounds: Array, stream: Any, first: Any, scratch: Any, out: Array) -> None:
    """`keep_between` of one chunk."""
    marks, hits, places, drawn = scratch
    low, low_share, high, high_share = bounds[0], bounds[1], bounds[2], bounds[3]
    zero = np.float32(0.0)
    if low == np.float32(np.inf):
        out[:] = zero
        return
    if not (low_share > zero or high_share > zero):
        _keep_inside(x, low, high, out)
        return
    if high == np.float32(np.inf):
        equals = _keep_and_mark_above(x, low, marks, out)
    else:
        equals = _keep_and_mark_inside(x, low, high, marks, out)
    begin = np.uint64(first) + np.uint64(1)
    if equals > MANY:
        draw(stream, begin, drawn[: x.size])
        _keep_drawn(x, bounds, drawn, out)
        return
    for j in range(places_of(marks, hits, places)):
        i = places[j]
        magnitude, number = abs(x[i]), number_at(stream, begin + np.uint64(i))
        keeps = (magnitude > low) | (number < low_share)
        drops = (magnitude > high) | ((magnitude == high) & (number < high_share))
        out[i] = x[i] if keeps & (not drops) else zero


@_loop
def _keep_inside(x: Array, low: Any, high: Any, out: Array) -> None:
    """`x` where its magnitude exceeds `low` but not `high`, zero elsewhere."""
    for i in range(x.size):
        magnitude = abs(x[i])
        beyond = x[i] - x[i]  # not a number, unless finite
        below = np.float32(0.0) if magnitude <= low else x[i]
        out[i] = beyond if magnitude > high else below


@_loop
def _keep_and_mark_inside(x: Array, low: Any, high: Any, marks: Array, out: Array) -> Any:
    """`_keep_inside`; mark the magnitudes that equal either bound as well. How many do?"""
    equals = np.int32(0)
    for i in range(x.size):
        magnitude = abs(x[i])
        beyond = x[i] - x[i]  # not a number, unless finite
        below = np.float32(0.0) if magnitude <= low else x[i]
        out[i] = beyond if magnitude > high else below
        mark = np.uint8((magnitude == low) | (magnitude == high))
        marks[i] = mark
        equals = np.int32(equals + np.int32(mark))
    marks[x.size :] = np.uint8(0)
    return equals


@_loop
def _keep_and_mark_above(x: Array, low: Any, marks: Array, out: Array) -> Any:
    """The same without an upper bound."""
    equals = np.int32(0)
    for i in range(x.size):
        magnitude = abs(x[i])
        out[i] = np.float32(0.0) if magnitude <= low else x[i]
        mark = np.uint8(magnitude == low)
        marks[i] = mark
        equals = np.int32(equals + np.int32(mark))
    marks[x.size :] = np.uint8(0)
    return equals


@_loop
def _keep_drawn(x: Array, bounds: Array, drawn: Array, out: Array) -> None:
    """As `keep_between`, with a number drawn for every element: where many are equals, that is
    faster than to look for them."""
    low, low_share, high, high_share = bounds[0], bounds[1], bounds[2], bounds[3]
    for i in range(x.size):
        magnitude = abs(x[i])
        keeps = (magnitude > low) | ((magnitude == low) & (drawn[i] < low_share))
        drops = (magnitude > high) | ((magnitude == high) & (drawn[i] < high_share))
        beyond = x[i] - x[i]  # not a number, unless finite
        kept = x[i] if keeps else beyond
        out[i] = beyond if drops else kept
