"""What the fused loops read, a chunk of elements at a time.

A loop that is given float32 reads it where it lies. Of bfloat16 it gets each chunk widened, and of
task vectors each chunk subtracted, into a scratch that stays in the first-level cache: whole blocks
of float32 would be written to memory and read back by every loop, and memory is what two threads
wait for. numba compiles a loop anew for each kind of operand, so one source serves all.

    float32 array           as it lies
    uint16 array            bfloat16
    (x, base)               the difference of two arrays
    (x, base, bits, first)  the same, zero where there is no mark: see `mark_kernels` beside this
    (rows, scratches)       how far rows are apart: the sum of squared differences from their mean
    (addresses, x)          rows: float32 arrays at these addresses, as long as `x`, one of them
    (addresses, x, base)    rows: such arrays, or bfloat16 ones, each minus the third
    (addresses, x, base, marks, firsts, bits)
                            the same, each zero where it has no mark: `marks` are addresses of bits,
                            zero for a row that has none; `bits` are one row's
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload
from numba.np.numpy_support import carray

from distmerge.methods.blocks import CHUNK
from distmerge.methods.mark_kernels import PLANE, thin

Array = np.ndarray[Any, Any]

_loop = njit(nogil=True, cache=True)


@_loop
def wide(bits: Any) -> Any:
    """The float32 of the same value as bfloat16 bits."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@_loop
def widen(bits: Array, out: Array) -> None:
    """bfloat16 in float32."""
    for i in range(out.size):
        out[i] = wide(bits[i])


def value(x: Any) -> Any:
    """The float32 that an element stands for."""
    raise NotImplementedError  # numba compiles `_value` in its place


@overload(value)
def _value(x: Any) -> Any:
    def widened(x: Any) -> Any:
        return wide(x)

    def own(x: Any) -> Any:
        return x

    return widened if x == types.uint16 else own


@_loop
def difference(x: Array, base: Array, out: Array) -> None:
    """`x` minus `base`, each float32 or bfloat16, in float32."""
    for i in range(out.size):
        out[i] = value(x[i]) - value(base[i])


@_loop
def _add_apart(x: Array, first: Array, squares: Array, total: Array) -> None:
    for i in range(x.size):
        apart = x[i] - first[i]
        total[i] += apart
        squares[i] += apart * apart


@_loop
def _subtract_mean(total: Array, share: Any, squares: Array) -> None:
    for i in range(total.size):
        squares[i] -= total[i] * total[i] * share


def _as_pointer(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.uint64), generate


_pointer: Any = intrinsic(_as_pointer)
"""An address as a pointer."""


@_loop
def array_at(address: Any, size: int, like: Array) -> Array:
    """So many elements that begin there, of the dtype of `like`; its owner must keep them."""
    return carray(_pointer(address), size, like.dtype)


def length(x: Any) -> int:
    """Elements of an operand, or of each of its rows."""
    raise NotImplementedError  # numba compiles `_length` in its place


@overload(length)
def _length(x: Any) -> Any:
    if isinstance(x, types.BaseTuple):

        def second(x: Any) -> Any:
            return x[1].size

        def of_rows(x: Any) -> Any:
            return length(x[0])

        return of_rows if _has_rows(x) else second

    def own(x: Any) -> Any:
        return x.size

    return own


def _has_rows(x: Any) -> bool:
    return isinstance(x[0], types.BaseTuple)


def chunk(x: Any, start: int, scratch: Array) -> Array:
    """An operand's elements from `start` on in float32, as many as `scratch` has, a chunk at
    most, if there are."""
    raise NotImplementedError  # numba compiles `_chunk` in its place


@overload(chunk)
def _chunk(x: Any, start: Any, scratch: Any) -> Any:
    def subtracted(x: Any, start: Any, scratch: Any) -> Any:
        out = scratch[: min(scratch.size, x[1].size - start)]
        difference(x[0][start : start + out.size], x[1][start : start + out.size], out)
        return out

    def thinned(x: Any, start: Any, scratch: Any) -> Any:
        out = chunk((x[0], x[1]), start, scratch)
        thin(out, x[2], x[3] + start)
        return out

    def apart(x: Any, start: Any, scratch: Any) -> Any:
        rows, scratches = x
        firsts, others = scratches[0, : scratch.size], scratches[2, : scratch.size]
        first = row_chunk(rows, 0, start, firsts)
        squares, total = scratch[: first.size], scratches[1, : first.size]
        squares[:], total[:] = np.float32(0.0), np.float32(0.0)
        for row in range(1, rows[0].size):
            _add_apart(row_chunk(rows, row, start, others), first, squares, total)
        _subtract_mean(total, np.float32(1.0 / rows[0].size), squares)
        return squares

    def widened(x: Any, start: Any, scratch: Any) -> Any:
        out = scratch[: min(scratch.size, x.size - start)]
        widen(x[start : start + out.size], out)
        return out

    def as_it_lies(x: Any, start: Any, scratch: Any) -> Any:
        return x[start : start + scratch.size]

    if isinstance(x, types.BaseTuple):
        if _has_rows(x):
            return apart
        return subtracted if len(x) == 2 else thinned
    return widened if x.dtype == types.uint16 else as_it_lies


def row_chunk(rows: Any, row: int, start: int, scratch: Array) -> Array:
    """The same of one of several rows."""
    raise NotImplementedError  # numba compiles `_row_chunk` in its place


@overload(row_chunk)
def _row_chunk(rows: Any, row: Any, start: Any, scratch: Any) -> Any:
    def subtracted(rows: Any, row: Any, start: Any, scratch: Any) -> Any:
        model = array_at(rows[0][row], rows[1].size, rows[1])
        return chunk((model, rows[2]), start, scratch)

    def as_it_lies(rows: Any, row: Any, start: Any, scratch: Any) -> Any:
        return array_at(rows[0][row], rows[1].size, rows[1])[start : start + scratch.size]

    def thinned(rows: Any, row: Any, start: Any, scratch: Any) -> Any:
        out = row_chunk((rows[0], rows[1], rows[2]), row, start, scratch)
        if rows[3][row] != np.uint64(0):
            first = rows[4][row] + start
            stop = (first + out.size + CHUNK - 1) // CHUNK * PLANE
            thin(out, array_at(rows[3][row], stop, rows[5]), first)
        return out

    return {2: as_it_lies, 3: subtracted, 6: thinned}[len(rows)]
