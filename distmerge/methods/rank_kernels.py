"""The fused loops that keep by rank: the larger an element's magnitude in its row, the likelier.

Hardly any rank is computed. A row's magnitudes are counted in cells by their leading bits; a number
drawn that lies outside the chances which the ranks of a cell give has decided, and so has any in a
cell of equals. Only what is left is ranked, by counting the smaller ones and the equals.

As in `distmerge.methods.kernels`, each loop has a plain torch spelling beside its caller which
gives the same bits; the numbers drawn are those of `distmerge.methods.random`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from distmerge.methods.blocks import CHUNK
from distmerge.methods.chunks import chunk, length
from distmerge.methods.mark_kernels import PLANE, pack, places_of
from distmerge.methods.random_kernels import draw

Array = np.ndarray[Any, Any]

CELLS = 1024
"""Cells that a row's magnitudes are counted in."""
CELL_SHIFT = 16
"""Bits that a cell leaves open: of a float32, 128 cells for every power of two. The difference
of two bfloat16 of one binade has no more than the 7 bits that are told apart."""
SCANS = 256
"""Magnitudes of a row that are counted one by one before it is sorted."""

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_LOWER = np.uint32((1 << CELL_SHIFT) - 1)
_ANY = np.uint64(0xFFFFFFFF << 32)
ROUNDING = 2.0**-22
"""By what chances in float32 may be further apart than they are."""

_loop = njit(nogil=True, cache=True)


@_loop
def _twice_rank(bits: Array, b: Any) -> Any:
    """Two times the mean of the ranks that those that equal `b` have."""
    twice = np.int32(-1)
    for i in range(bits.size):
        twice += np.int32(bits[i] < b) + np.int32(bits[i] <= b)
    return np.int64(twice)


@_loop
def _sort_into_cells(row: Array, bits: Array, cell: Array, seen: Array) -> None:
    """The magnitudes' bits, the cell of each, and which of the lower bits, which say where in it,
    are set and which aren't. Cells begin so far below the largest finite magnitude as there are
    cells for; all that is smaller is at the very beginning, what isn't finite at the very end."""
    raw = row.view(np.int32)
    top = np.int32(0)
    for i in range(row.size):
        b = raw[i] & _MAGNITUDE
        bits[i] = b
        top = max(top, b if b < _INFINITY else np.int32(0))
    last = np.int32((CELLS << CELL_SHIFT) - 1)
    floor = max(top - last, np.int32(0))
    for i in range(row.size):
        place = np.uint32(min(max(bits[i], floor) - floor, last))
        lower = place & _LOWER
        cell[i] = place >> np.uint32(CELL_SHIFT)
        seen[i] = lower | ((lower ^ _LOWER) << np.uint32(CELL_SHIFT))


@_loop
def _count(cell: Array, seen: Array, cells: Array) -> None:
    """How many lie in each cell, in the lower half of 64 bits: one number to read and write. In the
    upper half, which of the lower bits are ever set there, which ever not."""
    for i in range(cell.size):
        c = cell[i]
        cells[c] = (cells[c] + np.uint64(1)) | (np.uint64(seen[i]) << np.uint64(32))


@_loop
def _cell_chances(cells: Array, least: float, step: float, sure: Array, maybe: Array) -> Any:
    """The chances of the first and of the last rank in each cell; of the mean rank, where all are
    equals. Returns what they are apart at most."""
    below = np.empty(CELLS, np.int32)
    smaller, most = np.int32(0), np.int32(0)
    for c in range(CELLS):
        below[c] = smaller
        smaller += np.int32(cells[c])
    # At both ends, there are others than the lower bits tell.
    cells[0] |= _ANY
    cells[CELLS - 1] |= _ANY
    for c in range(CELLS):
        count, seen = np.int32(cells[c]), np.uint32(cells[c] >> np.uint64(32))
        equals = (seen & (seen >> np.uint32(CELL_SHIFT)) & _LOWER) == np.uint32(0)
        apart = np.int32(np.int32(0) if equals else count - np.int32(1))
        # In float64, exact: AVX2 has no conversion of the 64-bit integers that numba would make.
        first = 2.0 * np.float64(below[c]) + np.float64(np.int32(count - np.int32(1) - apart))
        sure[c] = np.float32(least + step * first)
        maybe[c] = np.float32(least + step * (first + 2.0 * np.float64(apart)))
        most = max(most, apart)
    return np.float32(step * (2.0 * np.float64(most)) + ROUNDING)


@_loop
def _look_up(cell: Array, sure: Array, least: Array) -> None:
    for i in range(cell.size):
        least[i] = sure[cell[i]]


@_loop
def _mark_by_cell(least: Array, drawn: Array, apart: Any, marks: Array, doubts: Array) -> None:
    """Mark what is kept by the least chance in its cell; and what the greatest might keep, which to
    look up as well would take as long again."""
    for i in range(marks.size):
        u = drawn[i]
        marks[i] = np.uint8(u < least[i])
        doubts[i] = np.uint8((u >= least[i]) & (u - least[i] < apart))


@_loop
def _mark_ranked(
    bits: Array,
    cell: Array,
    drawn: Array,
    maybe: Array,
    doubts: Array,
    least: float,
    step: float,
    marks: Array,
) -> None:
    """Rank what is in doubt, and mark it if its number drawn says so. A zero is the same kept or
    not, and never ranked.

    doubts: where they lie.
    """
    if doubts.size == 0:
        return
    # The magnitude of a cell that was ranked last, and its chance: equals come often.
    ranked, chance = np.zeros(CELLS, np.int32), np.empty(CELLS, np.float32)
    scans, in_order = 0, bits[:0]
    for j in range(doubts.size):
        i = doubts[j]
        c, b = cell[i], bits[i]
        if b == 0 or drawn[i] >= maybe[c]:
            continue
        if ranked[c] != b:
            scans += 1
            if scans == SCANS:
                in_order = np.sort(bits)
            if scans < SCANS:
                twice = _twice_rank(bits, b)
            else:
                before = np.searchsorted(in_order, b)
                twice = before + np.searchsorted(in_order, b, "right") - 1
            ranked[c] = b
            chance[c] = np.float32(least + step * twice)
        if drawn[i] < chance[c]:
            marks[i] = np.uint8(1)


@_loop
def _mark_rows(
    x: Any, width: int, stream: Any, first: int, least: float, step: float, marks: Array
) -> None:
    """Rows of `width`: mark where the uniform number of the position is below
    `least + step * twice`; `twice` is two times the magnitude's rank in the row."""
    # What is used up makes room: numbers are drawn where the row was, chances where bits were seen.
    row, bits = np.empty(width, np.float32), np.empty(width, np.int32)
    cell, seen = np.empty(width, np.uint32), np.empty(width, np.uint32)
    drawn, least_there = row, seen.view(np.float32)
    cells = np.empty(CELLS, np.uint64)
    doubts = np.zeros((width + 7) // 8 * 8, np.uint8)  # to be looked at eight at a time
    hits, places = np.empty(doubts.size // 8 + 1, np.uint32), np.empty(doubts.size, np.uint32)
    sure, maybe = np.empty(CELLS, np.float32), np.empty(CELLS, np.float32)
    for at in range(0, length(x), width):
        begin = np.uint64(first) + np.uint64(at) + np.uint64(1)
        found = marks[at : at + width]
        _sort_into_cells(chunk(x, at, row), bits, cell, seen)
        cells[:] = np.uint64(0)
        _count(cell, seen, cells)
        apart = _cell_chances(cells, least, step, sure, maybe)
        draw(stream, begin, drawn)
        _look_up(cell, sure, least_there)
        _mark_by_cell(least_there, drawn, apart, found, doubts[:width])
        doubtful = places[: places_of(doubts, hits, places)]
        _mark_ranked(bits, cell, drawn, maybe, doubtful, least, step, found)


@_loop
def mark_by_rank(
    x: Any, width: int, stream: Any, first: int, least: float, step: float, bits: Array
) -> None:
    """See `_mark_rows`."""
    size = length(x)
    marks = np.zeros((size + CHUNK - 1) // CHUNK * CHUNK, np.uint8)
    _mark_rows(x, width, stream, first, least, step, marks[:size])
    for start in range(0, size, CHUNK):
        pack(marks[start : start + CHUNK], bits[start // 8 : start // 8 + PLANE])


@_loop
def keep_by_rank(
    x: Array, width: int, stream: Any, first: int, least: float, step: float, out: Array
) -> None:
    """`x` where `mark_by_rank` marks it, zero elsewhere."""
    marks = np.empty(x.size, np.uint8)
    _mark_rows(x, width, stream, first, least, step, marks)
    for i in range(x.size):
        out[i] = x[i] * np.float32(marks[i])
