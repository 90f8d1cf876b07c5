"""The fused loops that look for a cut: what is counted, and what is listed, of magnitudes by their
bits.

As in `distmerge.methods.kernels`, each has a plain torch spelling beside its caller which gives
the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from distmerge.methods.blocks import CHUNK
from distmerge.methods.chunks import chunk, length
from distmerge.methods.mark_kernels import WORDS, places_of

Array = np.ndarray[Any, Any]

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)

_loop = njit(nogil=True, cache=True)


@_loop
def histogram(
    x: Any, shift: int, prefix_shift: int, prefix: int, least: int, counts: Array
) -> None:
    """Count the magnitudes' bits from `shift` on, of those whose bits from `prefix_shift` on equal
    `prefix`. Infinities and NaN are left out, and what is below `least`."""
    mask = np.int32(counts.size - 1)
    scratch = np.empty(CHUNK, np.float32)
    for start in range(0, length(x), CHUNK):
        bits = chunk(x, start, scratch).view(np.int32)
        for i in range(bits.size):
            b = bits[i] & _MAGNITUDE
            if least <= b < _INFINITY and (b >> prefix_shift) == prefix:
                counts[(b >> shift) & mask] += 1


@_loop
def _zeros(part: Array) -> Any:
    found = np.int32(0)
    for i in range(part.size):
        found = np.int32(found + np.int32(part[i] == np.float32(0.0)))
    return found


@_loop
def _mark(part: Array, lo: Any, hi: Any, marks: Array) -> tuple[Any, Any]:
    """Mark with ones what lies in `lo..hi`; how many lie above, how many aren't finite."""
    over, beyond = np.int32(0), np.int32(0)
    for i in range(part.size):
        b = np.int32(part[i] & _MAGNITUDE)
        over = np.int32(over + np.int32(b > hi))
        beyond = np.int32(beyond + np.int32(b >= _INFINITY))
        marks[i] = np.uint8((b >= lo) & (b <= hi))
    marks[part.size :] = np.uint8(0)
    return over, beyond


@_loop
def bracket(x: Any, low: int, high: int, least: int, counts: Array) -> tuple[int, int]:
    """Count each magnitude in `low..high` by its bits; how many lie above, how many are finite, and
    not zero if `least` isn't."""
    above, uncounted = np.int64(0), np.int64(0)
    lo, hi = np.int32(low), np.int32(high)
    scratch = np.empty(CHUNK, np.float32)
    marks, hits = np.empty(CHUNK, np.uint8), np.empty(WORDS + 1, np.uint32)
    places = np.empty(CHUNK, np.uint32)
    for start in range(0, length(x), CHUNK):
        part = chunk(x, start, scratch).view(np.int32)
        over, beyond = _mark(part, lo, hi, marks)
        above += np.int64(over) - np.int64(beyond)
        uncounted += np.int64(beyond)
        if least > 0:
            uncounted += np.int64(_zeros(part.view(np.float32)))
        for j in range(places_of(marks, hits, places)):
            counts[(part[places[j]] & _MAGNITUDE) - lo] += 1
    return int(above), int(length(x) - uncounted)


@_loop
def inside(x: Any, low: int, high: int, least: int) -> tuple[int, int, Array]:
    """As `bracket`, but the magnitudes in `low..high` are listed instead of counted."""
    found = np.empty(CHUNK, np.int32)
    n = 0
    above, uncounted = np.int64(0), np.int64(0)
    lo, hi = np.int32(low), np.int32(high)
    scratch = np.empty(CHUNK, np.float32)
    marks, hits = np.empty(CHUNK, np.uint8), np.empty(WORDS + 1, np.uint32)
    places = np.empty(CHUNK, np.uint32)
    for start in range(0, length(x), CHUNK):
        part = chunk(x, start, scratch).view(np.int32)
        over, beyond = _mark(part, lo, hi, marks)
        above += np.int64(over) - np.int64(beyond)
        uncounted += np.int64(beyond)
        if least > 0:
            uncounted += np.int64(_zeros(part.view(np.float32)))
        found = _with_room(found, n)
        n = _list(part, places[: places_of(marks, hits, places)], found, n)
    return int(above), int(length(x) - uncounted), found[:n].copy()


@_loop
def _with_room(found: Array, n: int) -> Array:
    """It, or a longer one with its first `n`, so that there is room for a chunk's."""
    if n + CHUNK <= found.size:
        return found
    more = np.empty(2 * found.size, np.int32)
    more[:n] = found[:n]
    return more


@_loop
def _list(part: Array, places: Array, found: Array, n: int) -> int:
    """Add the magnitudes at these places behind the first `n`; how many there are then."""
    for j in range(places.size):
        found[n + j] = part[places[j]] & _MAGNITUDE
    return n + int(places.size)


@_loop
def _mark_both(
    part: Array, low: Any, high: Any, upper_low: Any, upper_high: Any, marks: Array
) -> tuple[Any, Any, Any]:
    """Mark what lies in either bracket; how many lie above the one, above the other, how many
    aren't finite."""
    over, over_upper, beyond = np.int32(0), np.int32(0), np.int32(0)
    for i in range(part.size):
        b = np.int32(part[i] & _MAGNITUDE)
        over = np.int32(over + np.int32(b > high))
        over_upper = np.int32(over_upper + np.int32(b > upper_high))
        beyond = np.int32(beyond + np.int32(b >= _INFINITY))
        marks[i] = np.uint8(((b >= low) & (b <= high)) | ((b >= upper_low) & (b <= upper_high)))
    marks[part.size :] = np.uint8(0)
    return over, over_upper, beyond


@_loop
def inside_both(
    x: Any, low: int, high: int, upper_low: int, upper_high: int
) -> tuple[int, int, int, Array]:
    """As `inside` of either bracket, but zeros count: how many lie above the one, above the other,
    how many are finite, and a list for both. A pass less over the operand."""
    found, n = np.empty(CHUNK, np.int32), 0
    above, above_upper, uncounted = np.int64(0), np.int64(0), np.int64(0)
    scratch = np.empty(CHUNK, np.float32)
    marks, hits = np.empty(CHUNK, np.uint8), np.empty(WORDS + 1, np.uint32)
    places = np.empty(CHUNK, np.uint32)
    ends = np.int32(low), np.int32(high), np.int32(upper_low), np.int32(upper_high)
    for start in range(0, length(x), CHUNK):
        part = chunk(x, start, scratch).view(np.int32)
        over, over_upper, beyond = _mark_both(part, ends[0], ends[1], ends[2], ends[3], marks)
        above += np.int64(over) - np.int64(beyond)
        above_upper += np.int64(over_upper) - np.int64(beyond)
        uncounted += np.int64(beyond)
        found = _with_room(found, n)
        n = _list(part, places[: places_of(marks, hits, places)], found, n)
    return int(above), int(above_upper), int(length(x) - uncounted), found[:n].copy()
