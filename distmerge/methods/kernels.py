"""The inner loops that are fused because torch would pass over memory once for every operation.

Each loop here has a plain torch spelling beside its caller, which is its specification; where
numba is missing, and on a GPU, that one runs. All but the float sums give the same bits as their
specification. Sums are folded in 256 fixed lanes here and in torch's own order there, so the two
are different kernel classes and the digest records which one ran.

Written for LLVM's vectoriser: no branch and no index arithmetic in a hot loop (hence the slices),
short chunks that stay in the first-level cache, no fast-math, so that the results don't depend on
the width of the processor's vectors. numba widens every sum and every `&` of integers to 64 bits;
the casts in the loops keep them at 32, which makes them two to five times faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from distmerge.methods.blocks import CHUNK
from distmerge.methods.chunks import chunk, length, row_chunk
from distmerge.methods.cutoff_kernels import bracket as bracket
from distmerge.methods.cutoff_kernels import histogram as histogram
from distmerge.methods.cutoff_kernels import inside as inside
from distmerge.methods.cutoff_kernels import inside_both as inside_both
from distmerge.methods.mark_kernels import thin
from distmerge.methods.random_kernels import keep_at_random as keep_at_random
from distmerge.methods.random_kernels import mark_at_random as mark_at_random
from distmerge.methods.rank_kernels import keep_by_rank as keep_by_rank
from distmerge.methods.rank_kernels import mark_by_rank as mark_by_rank
from distmerge.methods.rounding_kernels import put, room
from distmerge.methods.rounding_kernels import round_and_count as round_and_count
from distmerge.methods.rounding_kernels import round_to_bfloat16 as round_to_bfloat16
from distmerge.methods.trim_kernels import keep_between as keep_between
from distmerge.methods.trim_kernels import keep_chunk, new_scratch
from distmerge.methods.trim_kernels import mark_between as mark_between

Array = np.ndarray[Any, Any]

LANES = 256
"""Sums run side by side: as many as hide how long an addition takes."""

_loop = njit(nogil=True, cache=True)


@_loop
def compute(x: Any, out: Array) -> None:
    """What an operand stands for, in float32."""
    scratch = np.empty(CHUNK, np.float32)
    for start in range(0, out.size, CHUNK):
        out[start : start + CHUNK] = chunk(x, start, scratch)


@_loop
def trim_and_merge(
    base: Array,
    deltas: Any,
    bounds: Array,
    streams: Array,
    firsts: Array,
    weights: Array,
    votes: Array,
    factors: Array,
    elects: bool,
    normalize: bool,
    least: Any,
    divisor: Any,
    scale: Any,
    out: Any,
) -> None:
    """Trim, weigh, add up, scale, add to the base.

    base, deltas: see `distmerge.methods.chunks`; a row of deltas for each model.
    elects: elect a sign, and add up only what agrees with it.
    bounds, streams, firsts: for each model what `keep_between` takes.
    factors: what each model's entries are multiplied with once they are trimmed.
    votes: what each model's entries are multiplied with when signs are elected and compared.
    normalize, least: divide by the sum of the weights that agreed, at least by `least`.
    divisor: of the sum where no sign is elected.
    out: see `rounding_kernels.put`.
    """
    models, n = weights.size, length(deltas)
    kept = np.empty((models, CHUNK), np.float32)
    scratches, scratch = np.empty((6, CHUNK), np.float32), new_scratch()
    for start in range(0, n, CHUNK):
        before, after = chunk(base, start, scratches[0]), room(out, start, scratches[5])
        width = before.size
        for m in range(models):
            delta = row_chunk(deltas, m, start, scratches[1])
            where = firsts[m] + start
            keep_chunk(delta, bounds[m], streams[m], where, scratch, kept[m, :width])
            if factors[m] != np.float32(1.0):
                _scale(factors[m], kept[m, :width])
        merged, share = scratches[2, :width], scratches[3, :width]
        if elects:
            elected = scratches[4, :width]
            _weigh(kept[0, :width], votes[0], elected)
            for m in range(1, models):
                _vote(kept[m, :width], votes[m], elected)
            _to_signs(elected)
            _begin_agreed(kept[0, :width], weights[0], votes[0], elected, merged, share)
            for m in range(1, models):
                _add_agreed(kept[m, :width], weights[m], votes[m], elected, merged, share)
            if normalize:
                _divide(merged, share, least)
        else:
            _weigh(kept[0, :width], weights[0], merged)
            for m in range(1, models):
                _vote(kept[m, :width], weights[m], merged)
            _divide_by(divisor, merged)
        for j in range(width):
            after[j] = before[j] + merged[j] * scale
        put(after, start, out)


# Loops of their own: within one function LLVM can't tell the arrays apart, and is half as fast.


@_loop
def _vote(kept: Array, vote: Any, elected: Array) -> None:
    for j in range(kept.size):
        elected[j] += kept[j] * vote


@_loop
def _to_signs(elected: Array) -> None:
    for j in range(elected.size):
        elected[j] = np.float32(1.0) if elected[j] >= np.float32(0.0) else np.float32(-1.0)


@_loop
def _agrees(vote: Any, elected: Any) -> Any:
    """One if a vote has the elected sign, else zero."""
    return np.float32(1.0) if vote * elected > np.float32(0.0) else np.float32(0.0)


@_loop
def _begin_agreed(
    kept: Array, weight: Any, vote: Any, elected: Array, merged: Array, share: Array
) -> None:
    """`_add_agreed` to zeros, which needn't be written first."""
    for j in range(kept.size):
        d = kept[j]
        agrees = _agrees(d * vote, elected[j])
        merged[j] = np.float32(0.0) + d * weight * agrees  # never the negative zero
        share[j] = weight * agrees


@_loop
def _add_agreed(
    kept: Array, weight: Any, vote: Any, elected: Array, merged: Array, share: Array
) -> None:
    for j in range(kept.size):
        d = kept[j]
        agrees = _agrees(d * vote, elected[j])
        merged[j] += d * weight * agrees
        share[j] += weight * agrees


@_loop
def _divide(merged: Array, share: Array, least: Any) -> None:
    for j in range(merged.size):
        divisor = least if share[j] < least else share[j]
        merged[j] /= divisor if divisor != np.float32(0.0) else np.float32(1.0)


@_loop
def _weigh(kept: Array, weight: Any, merged: Array) -> None:
    for j in range(kept.size):
        merged[j] = kept[j] * weight


@_loop
def _scale(factor: Any, kept: Array) -> None:
    for j in range(kept.size):
        kept[j] *= factor


@_loop
def _divide_by(divisor: Any, merged: Array) -> None:
    for j in range(merged.size):
        merged[j] /= divisor


@_loop
def dot(x: Any, y: Any) -> float:
    """Sum of products in float64, in lanes that are added up in order at the end."""
    lanes = np.zeros(LANES, np.float64)
    scratches = np.empty((2, CHUNK), np.float32)
    for at in range(0, length(x), CHUNK):
        left, right = chunk(x, at, scratches[0]), chunk(y, at, scratches[1])
        for start in range(0, left.size, LANES):
            _add_products(left[start : start + LANES], right[start : start + LANES], lanes)
    return in_order(lanes)


@_loop
def squares(x: Any) -> float:
    """The sum of the squares, as `dot` would find it."""
    lanes, scratch = np.zeros(LANES, np.float64), np.empty(CHUNK, np.float32)
    for at in range(0, length(x), CHUNK):
        held = chunk(x, at, scratch)
        for start in range(0, held.size, LANES):
            part = held[start : start + LANES]
            _add_products(part, part, lanes)
    return in_order(lanes)


@_loop
def _add_products(left: Array, right: Array, lanes: Array) -> None:
    for j in range(left.size):
        lanes[j] += np.float64(left[j]) * np.float64(right[j])


@_loop
def total(x: Any) -> float:
    """Sum of the elements in float64, in the lanes of `dot`."""
    lanes = np.zeros(LANES, np.float64)
    scratch = np.empty(CHUNK, np.float32)
    for at in range(0, length(x), CHUNK):
        held = chunk(x, at, scratch)
        for start in range(0, held.size, LANES):
            _add(held[start : start + LANES], lanes)
    return in_order(lanes)


@_loop
def magnitudes(x: Any, size: int) -> Array:
    """Sums of the magnitudes of `size` elements at a time, as `total` would find them."""
    sums = np.empty((length(x) + size - 1) // size, np.float64)
    lanes, scratch = np.empty(LANES, np.float64), np.empty(CHUNK, np.float32)
    for piece in range(sums.size):
        lanes[:] = 0.0
        stop = min((piece + 1) * size, length(x))
        for at in range(piece * size, stop, CHUNK):
            held = chunk(x, at, scratch[: min(CHUNK, stop - at)])
            for start in range(0, held.size, LANES):
                _add_magnitudes(held[start : start + LANES], lanes)
        sums[piece] = in_order(lanes)
    return sums


@_loop
def magnitudes_thinned(x: Any, size: int) -> Array:
    """`magnitudes` of a thinned task vector before, and after: two columns."""
    model, base, bits, first = x
    sums = np.empty(((base.size + size - 1) // size, 2), np.float64)
    before, after = np.empty(LANES, np.float64), np.empty(LANES, np.float64)
    scratch = np.empty(CHUNK, np.float32)
    for piece in range(len(sums)):
        before[:], after[:] = 0.0, 0.0
        stop = min((piece + 1) * size, base.size)
        for at in range(piece * size, stop, CHUNK):
            held = chunk((model, base), at, scratch[: min(CHUNK, stop - at)])
            for start in range(0, held.size, LANES):
                _add_magnitudes(held[start : start + LANES], before)
            thin(held, bits, first + at)
            for start in range(0, held.size, LANES):
                _add_magnitudes(held[start : start + LANES], after)
        sums[piece, 0], sums[piece, 1] = in_order(before), in_order(after)
    return sums


@_loop
def _add(part: Array, lanes: Array) -> None:
    for j in range(part.size):
        lanes[j] += np.float64(part[j])


@_loop
def _add_magnitudes(part: Array, lanes: Array) -> None:
    for j in range(part.size):
        lanes[j] += np.float64(abs(part[j]))


@_loop
def in_order(lanes: Array) -> float:
    """Their sum, from the first to the last."""
    result = 0.0
    for j in range(lanes.size):
        result += lanes[j]
    return result
