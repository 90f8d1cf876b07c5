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
def elect_and_merge(
    base: Array, deltas: Array, cuts: Array, weights: Array, normalize: bool, scale: Any, out: Array
) -> None:
    """Trim, weigh, elect signs, merge what agrees, scale, add to the base.

    deltas: models x elements. Entries from -cut to cut count as zero. All float32.
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
            cut, weight = cuts[m], weights[m]
            delta, part = deltas[m, start : start + CHUNK], kept[m]
            for j in range(width):
                d = delta[j]
                part[j] = (zero if (d >= -cut) & (d <= cut) else d) * weight
        first = kept[0]
        for j in range(width):
            elected[j] = first[j]
            merged[j] = zero
            share[j] = zero
        for m in range(1, models):
            part = kept[m]
            for j in range(width):
                elected[j] += part[j]
        for j in range(width):
            elected[j] = one if elected[j] >= zero else -one
        for m in range(models):
            weight, part = weights[m], kept[m]
            for j in range(width):
                d = part[j]
                agrees = one if d * elected[j] > zero else zero
                merged[j] += d * agrees
                share[j] += weight * agrees
        if normalize:
            for j in range(width):
                merged[j] = merged[j] / (share[j] if share[j] != zero else one)
        for j in range(width):
            after[j] = before[j] + merged[j] * scale


@_loop
def keep_at_random(x: Array, stream: Any, first: int, keep: Any, out: Array) -> None:
    """`x` where the uniform number of its position is below `keep`, zero elsewhere. The numbers
    are those of `distmerge.methods.random`."""
    golden, mix_1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
    mix_2, unit = np.uint64(0x94D049BB133111EB), np.float32(2.0**-24)
    begin = np.uint64(first) + np.uint64(1)
    for i in range(x.size):
        z = stream + (begin + np.uint64(i)) * golden
        z = (z ^ (z >> np.uint64(30))) * mix_1
        z = (z ^ (z >> np.uint64(27))) * mix_2
        z = z ^ (z >> np.uint64(31))
        drawn = np.float32(np.int32(z >> np.uint64(40))) * unit
        out[i] = x[i] * (np.float32(1.0) if drawn < keep else np.float32(0.0))


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
