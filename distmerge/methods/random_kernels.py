"""The fused loops that draw: by position, among equals at a cut, by rank within a row.

As in `distmerge.methods.kernels`, each has a plain torch spelling beside its caller which gives
the same bits; the numbers drawn are those of `distmerge.methods.random`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from distmerge.methods.chunks import CHUNK, chunk

Array = np.ndarray[Any, Any]

MANY = CHUNK // 8
"""Equals in a chunk from which a number is drawn for every element: to look for them takes as long
with this many, and four times as long with three tenths."""
CELLS = 1024
"""Cells that a row's magnitudes are counted in."""
CELL_SHIFT = 16
"""Bits that a cell leaves open: of a float32, 128 cells for every power of two. The difference
of two bfloat16 of one binade has no more than the 7 bits that are told apart."""
SCANS = 256
"""Magnitudes of a row that are counted one by one before it is sorted."""

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

_loop = njit(nogil=True, cache=True)


@_loop
def _drawn(z: Any) -> Any:
    """The uniform number of a stream's state."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    z = z ^ (z >> np.uint64(31))
    return np.float32(np.int32(z >> np.uint64(40))) * np.float32(2.0**-24)


@_loop
def keep_at_random(x: Any, stream: Any, first: int, keep: Any, out: Array) -> None:
    """`x` where the uniform number of its position is below `keep`, zero elsewhere."""
    scratch = np.empty(CHUNK, np.float32)
    for start in range(0, out.size, CHUNK):
        begin = np.uint64(first) + np.uint64(start) + np.uint64(1)
        _keep_below(chunk(x, start, scratch), stream, begin, keep, out[start : start + CHUNK])


@_loop
def _keep_below(x: Array, stream: Any, begin: Any, keep: Any, out: Array) -> None:
    for i in range(x.size):
        drawn = _drawn(stream + (begin + np.uint64(i)) * _GOLDEN)
        out[i] = x[i] * (np.float32(1.0) if drawn < keep else np.float32(0.0))


@_loop
def keep_between(x: Array, bounds: Array, stream: Any, first: int, out: Array) -> None:
    """`x` where its magnitude exceeds `low` but not `high`, zero elsewhere.

    Of those that equal `low` the share `low_share` is kept, of those that equal `high` the share
    `high_share` is dropped, by the same draw. What is not finite stays so.

    bounds: low, low_share, high, high_share; float32. Infinite `low` drops everything.
    first: the position of x[0] in the stream.
    """
    low, low_share, high, high_share = bounds[0], bounds[1], bounds[2], bounds[3]
    zero = np.float32(0.0)
    if low == np.float32(np.inf):
        out[:] = zero
        return
    begin = np.uint64(first) + np.uint64(1)
    draws_low, draws_high = low_share > zero, high_share > zero
    marks = np.empty(CHUNK, np.uint8)
    words = marks.view(np.uint64)  # eight marks at a time: most have none
    drawn_all = np.empty(CHUNK, np.float32)
    for start in range(0, x.size, CHUNK):
        part, kept = x[start : start + CHUNK], out[start : start + CHUNK]
        for i in range(part.size):
            magnitude = abs(part[i])
            beyond = part[i] - part[i]  # not a number, unless finite
            below = zero if magnitude <= low else part[i]
            kept[i] = beyond if magnitude > high else below
        if not (draws_low or draws_high):
            continue
        equals = np.int32(0)
        for i in range(part.size):
            magnitude = abs(part[i])
            mark = np.uint8((magnitude == low) | (magnitude == high))
            marks[i] = mark
            equals = np.int32(equals + np.int32(mark))
        if equals > MANY:
            _draw(stream, begin + np.uint64(start), drawn_all[: part.size])
            _keep_drawn(part, bounds, drawn_all, kept)
            continue
        marks[part.size :] = np.uint8(0)
        for w in range(words.size):
            if words[w]:
                for i in range(8 * w, 8 * w + 8):
                    if marks[i]:
                        magnitude = abs(part[i])
                        drawn = _drawn(stream + (begin + np.uint64(start + i)) * _GOLDEN)
                        keeps = magnitude > low or drawn < low_share
                        drops = magnitude > high or (magnitude == high and drawn < high_share)
                        kept[i] = part[i] if keeps and not drops else zero


@_loop
def _draw(stream: Any, begin: Any, out: Array) -> None:
    """The uniform numbers of the positions from `begin` on."""
    for i in range(out.size):
        out[i] = _drawn(stream + (begin + np.uint64(i)) * _GOLDEN)


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


@_loop
def _twice_rank(bits: Array, b: Any) -> Any:
    """Two times the mean of the ranks that those that equal `b` have."""
    twice = np.int32(-1)
    for i in range(bits.size):
        twice += np.int32(bits[i] < b) + np.int32(bits[i] <= b)
    return np.int64(twice)


@_loop
def _sort_into_cells(row: Array, bits: Array, cell: Array) -> None:
    """The magnitudes' bits, and by their leading ones the cell of each; cells begin so far below
    the largest finite magnitude as there are cells for, and all that is smaller is in the first."""
    raw = row.view(np.int32)
    top = np.int32(0)
    for i in range(row.size):
        b = raw[i] & _MAGNITUDE
        bits[i] = b
        top = max(top, b if b < _INFINITY else np.int32(0))
    floor = max(top - np.int32(CELLS << CELL_SHIFT) + np.int32(1), np.int32(0))
    for i in range(row.size):
        found = (max(bits[i], floor) - floor) >> CELL_SHIFT
        cell[i] = np.uint32(min(found, np.int32(CELLS - 1)))


@_loop
def _cell_chances(cell: Array, least: float, step: float, sure: Array, maybe: Array) -> None:
    """The chances of the first and of the last rank in each cell."""
    counts, below = np.zeros(CELLS, np.int32), np.empty(CELLS, np.int32)
    for i in range(cell.size):
        counts[cell[i]] += 1
    smaller = np.int32(0)
    for c in range(CELLS):
        below[c] = smaller
        smaller += counts[c]
    for c in range(CELLS):
        twice = 2 * below[c]
        sure[c] = np.float32(least + step * twice)
        maybe[c] = np.float32(least + step * (twice + 2 * counts[c] - 2))


@_loop
def _keep_by_cell(
    row: Array,
    bits: Array,
    cell: Array,
    drawn: Array,
    sure: Array,
    maybe: Array,
    bounds: tuple[Any, Any],
    left: Array,
    kept: Array,
) -> Any:
    """Keep or drop all for which the chances of a row, or of a cell, decide; list the others in
    `left`. How many are these? A zero is the same kept or not, and never among them."""
    one, zero = np.float32(1.0), np.float32(0.0)
    least, most = bounds
    for i in range(row.size):
        kept[i] = row[i] * (one if drawn[i] < least else zero)
    between = np.uint32(0)
    for i in range(np.uint32(row.size)):
        left[between] = i
        between += np.uint32((drawn[i] >= least) & (drawn[i] < most))
    undecided = np.uint32(0)
    for j in range(between):
        i = left[j]
        c, u = cell[i], drawn[i]
        s = sure[c]
        kept[i] = row[i] * (one if u < s else zero)
        left[undecided] = i
        undecided += np.uint32((u >= s) & (u < maybe[c]) & (bits[i] != 0))
    return undecided


@_loop
def _keep_ranked(
    row: Array,
    bits: Array,
    cell: Array,
    drawn: Array,
    left: Array,
    least: float,
    step: float,
    kept: Array,
) -> None:
    """Rank what is `left`, and keep what its number drawn says."""
    # The magnitude of a cell that was ranked last, and its chance: equals come often.
    ranked, chance = np.zeros(CELLS, np.int32), np.empty(CELLS, np.float32)
    scans, in_order = 0, bits[:0]
    for j in range(left.size):
        i = left[j]
        c, b = cell[i], bits[i]
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
            kept[i] = row[i]


@_loop
def keep_by_rank(
    x: Array,
    width: int,
    stream: Any,
    first: int,
    least: float,
    step: float,
    out: Array,
) -> None:
    """Rows of `width`: `x` where the uniform number of its position is below
    `least + step * twice`, zero elsewhere; `twice` is two times its magnitude's rank in the row.

    Hardly any rank is computed. A row's magnitudes are counted in cells by their leading bits; a
    number drawn that lies outside the chances which the ranks of a cell give has decided. Only
    what is left is ranked, by counting the smaller ones and the equals.
    """
    bits, cell = np.empty(width, np.int32), np.empty(width, np.uint32)
    drawn, left = np.empty(width, np.float32), np.empty(width, np.uint32)
    sure, maybe = np.empty(CELLS, np.float32), np.empty(CELLS, np.float32)
    bounds = np.float32(least), np.float32(least + step * (2 * width - 2))
    for at in range(0, x.size, width):
        row, kept = x[at : at + width], out[at : at + width]
        _sort_into_cells(row, bits, cell)
        _cell_chances(cell, least, step, sure, maybe)
        begin = stream + (np.uint64(first) + np.uint64(at) + np.uint64(1)) * _GOLDEN
        for i in range(width):
            drawn[i] = _drawn(begin + np.uint64(i) * _GOLDEN)
        undecided = _keep_by_cell(row, bits, cell, drawn, sure, maybe, bounds, left, kept)
        _keep_ranked(row, bits, cell, drawn, left[:undecided], least, step, kept)
