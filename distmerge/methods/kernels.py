"""The inner loops that are fused because torch would pass over memory once for every operation.

Each loop here has a plain torch spelling beside its caller, which is its specification; where
numba is missing, and on a GPU, that one runs. All but the float sums give the same bits as their
specification. Sums are folded in eight fixed lanes here and in torch's own order there, so the two
are different kernel classes and the digest records which one ran.

Written for LLVM's vectoriser: no branch and no index arithmetic in a hot loop (hence the slices),
short chunks that stay in the first-level cache, no fast-math, so that the results don't depend on
the width of the processor's vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from distmerge.methods.random_kernels import keep_at_random as keep_at_random
from distmerge.methods.random_kernels import keep_between as keep_between
from distmerge.methods.random_kernels import keep_by_rank as keep_by_rank

Array = np.ndarray[Any, Any]

CHUNK = 1024
"""Elements whose intermediate results fit into the first-level cache together."""
SKIP = 64
"""Elements that are only counted together unless one of them falls into a bracket."""
LANES = 8

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)

_loop = njit(nogil=True, cache=True)


@_loop
def histogram(bits: Array, shift: int, prefix_shift: int, prefix: int, counts: Array) -> None:
    """Count the magnitudes' bits from `shift` on, of those whose bits from `prefix_shift` on equal
    `prefix`. Infinities and NaN are left out. `bits` is the int32 view of float32."""
    mask = np.int32(counts.size - 1)
    for i in range(bits.size):
        b = bits[i] & _MAGNITUDE
        if b < _INFINITY and (b >> prefix_shift) == prefix:
            counts[(b >> shift) & mask] += 1


@_loop
def bracket(bits: Array, low: int, high: int, counts: Array) -> tuple[int, int]:
    """Count each magnitude in `low..high` by its bits; how many lie above, how many are finite."""
    above = np.int64(0)
    infinite = np.int64(0)
    lo, hi = np.int32(low), np.int32(high)
    for start in range(0, bits.size, SKIP):
        part = bits[start : start + SKIP]
        reach, over, beyond = np.uint32(0), np.uint32(0), np.uint32(0)
        for i in range(part.size):
            b = part[i] & _MAGNITUDE
            reach += np.uint32(b >= lo)
            over += np.uint32(b > hi)
            beyond += np.uint32(b >= _INFINITY)
        above += np.int64(over) - np.int64(beyond)
        infinite += np.int64(beyond)
        if reach != over:
            for i in range(part.size):
                b = part[i] & _MAGNITUDE
                if lo <= b <= hi:
                    counts[b - lo] += 1
    return int(above), int(bits.size - infinite)


@_loop
def inside(bits: Array, low: int, high: int) -> tuple[int, int, Array]:
    """As `bracket`, but the magnitudes in `low..high` are listed instead of counted."""
    found = np.empty(SKIP, np.int32)
    n = 0
    above = np.int64(0)
    infinite = np.int64(0)
    lo, hi = np.int32(low), np.int32(high)
    for start in range(0, bits.size, SKIP):
        part = bits[start : start + SKIP]
        reach, over, beyond = np.uint32(0), np.uint32(0), np.uint32(0)
        for i in range(part.size):
            b = part[i] & _MAGNITUDE
            reach += np.uint32(b >= lo)
            over += np.uint32(b > hi)
            beyond += np.uint32(b >= _INFINITY)
        above += np.int64(over) - np.int64(beyond)
        infinite += np.int64(beyond)
        if reach != over:
            if n + SKIP > found.size:
                more = np.empty(2 * found.size, np.int32)
                more[:n] = found[:n]
                found = more
            for i in range(part.size):
                b = part[i] & _MAGNITUDE
                found[n] = b
                n += (lo <= b) & (b <= hi)
    return int(above), int(bits.size - infinite), found[:n].copy()


@_loop
def elect_and_merge(
    base: Array,
    deltas: Array,
    cuts: Array,
    weights: Array,
    votes: Array,
    normalize: bool,
    least: Any,
    scale: Any,
    out: Array,
) -> None:
    """Trim, elect signs, weigh, merge what agrees, scale, add to the base.

    deltas: models x elements. Entries from -cut to cut count as zero. All float32.
    votes: what each model's entries are multiplied with when signs are elected and compared.
    least: the sum of the weights that agreed counts as no less when it divides.
    """
    zero, one = np.float32(0.0), np.float32(1.0)
    models, n = deltas.shape
    kept = np.empty((models, CHUNK), np.float32)
    elected = np.empty(CHUNK, np.float32)
    merged = np.empty(CHUNK, np.float32)
    share = np.empty(CHUNK, np.float32)
    for start in range(0, n, CHUNK):
        before, after = base[start : start + CHUNK], out[start : start + CHUNK]
        width = before.size
        for m in range(models):
            cut = cuts[m]
            delta, part = deltas[m, start : start + CHUNK], kept[m]
            for j in range(width):
                d = delta[j]
                part[j] = zero if (d >= -cut) & (d <= cut) else d
        first, vote = kept[0], votes[0]
        for j in range(width):
            elected[j] = first[j] * vote
            merged[j] = zero
            share[j] = zero
        for m in range(1, models):
            part, vote = kept[m], votes[m]
            for j in range(width):
                elected[j] += part[j] * vote
        for j in range(width):
            elected[j] = one if elected[j] >= zero else -one
        for m in range(models):
            weight, part, vote = weights[m], kept[m], votes[m]
            for j in range(width):
                d = part[j]
                agrees = one if d * vote * elected[j] > zero else zero
                merged[j] += d * weight * agrees
                share[j] += weight * agrees
        if normalize:
            for j in range(width):
                divisor = least if share[j] < least else share[j]
                merged[j] = merged[j] / (divisor if divisor != zero else one)
        for j in range(width):
            after[j] = before[j] + merged[j] * scale


@_loop
def spread(xs: Array, out: Array) -> None:
    """The sum of squared differences from the mean, element by element. xs: models x elements."""
    models, n = xs.shape
    share = np.float32(1.0 / models)
    total = np.empty(CHUNK, np.float32)
    for start in range(0, n, CHUNK):
        squares = out[start : start + CHUNK]
        first, width = xs[0, start : start + CHUNK], squares.size
        for j in range(width):
            squares[j] = np.float32(0.0)
            total[j] = np.float32(0.0)
        for m in range(1, models):
            x = xs[m, start : start + CHUNK]
            for j in range(width):
                apart = x[j] - first[j]
                total[j] += apart
                squares[j] += apart * apart
        for j in range(width):
            squares[j] -= total[j] * total[j] * share


@_loop
def keep_where(x: Array, mask: Array, out: Array) -> None:
    """`x` where `mask` is not zero, zero elsewhere."""
    for i in range(x.size):
        out[i] = x[i] if mask[i] != np.float32(0.0) else np.float32(0.0)


@_loop
def dot(x: Array, y: Array) -> float:
    """Sum of products in float64, in eight lanes that are added up in order at the end."""
    lanes = np.zeros(LANES, np.float64)
    whole = x.size - x.size % LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] += np.float64(x[i + j]) * np.float64(y[i + j])
    result = 0.0
    for j in range(LANES):
        result += lanes[j]
    for i in range(whole, x.size):
        result += np.float64(x[i]) * np.float64(y[i])
    return result


@_loop
def total(x: Array) -> float:
    """Sum in float64, in the lanes of `dot`."""
    lanes = np.zeros(LANES, np.float64)
    whole = x.size - x.size % LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] += np.float64(x[i + j])
    result = 0.0
    for j in range(LANES):
        result += lanes[j]
    for i in range(whole, x.size):
        result += np.float64(x[i])
    return result


@_loop
def round_to_bfloat16(bits: Array, out: Array) -> bool:
    """Round float32 bits to bfloat16 bits, to nearest, ties to even. Is every result finite?"""
    largest = np.int32(0)
    for i in range(bits.size):
        b = bits[i]
        magnitude = b & _MAGNITUDE
        largest = max(largest, magnitude)
        rounded = (b + np.int32(0x7FFF) + ((b >> 16) & np.int32(1))) >> 16
        out[i] = np.int16(rounded if magnitude <= _INFINITY else np.int32(0x7FC0))
    return bool(largest < np.int32(0x7F7F8000))


@_loop
def count_changes(bits: Array, out: Array, base: Array) -> tuple[int, int]:
    """How many float32 results differ from the base, and how many of these don't once they are
    bfloat16. `bits` are the results', `out` and `base` the bits of bfloat16; zeros are equal
    whatever their sign."""
    changed = lost = 0
    for i in range(bits.size):
        before = np.int32(base[i]) << 16
        zero = ((bits[i] | before) & _MAGNITUDE) == 0
        differs = (bits[i] != before) & (not zero)
        same = (out[i] == base[i]) | (((out[i] | base[i]) & np.int16(0x7FFF)) == 0)
        changed += differs
        lost += differs & same
    return changed, lost
