"""Which of a chunk's elements: marks, a byte for each, and the same in bits, to be kept.

A chunk's bits lie in eight runs of `PLANE` bytes' worth: element `i` has bit `i // PLANE` of byte
`i % PLANE`, so that packing and multiplying are plain loops over neighbours, which vectorise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from distmerge.methods.blocks import CHUNK

Array = np.ndarray[Any, Any]

PLANE = CHUNK // 8
"""Bytes that hold the bits of a chunk."""
WORDS = CHUNK // 8
"""Marks are looked at eight at a time: most have none."""
_BYTES = np.uint64(0x0001020304050607)
"""Times the lowest one of eight bytes, each zero or one: its number, in the highest byte."""

_loop = njit(nogil=True, cache=True)


@_loop
def pack(marks: Array, bits: Array) -> None:
    """A chunk's marks, each zero or one, in bits."""
    # Constant shifts: with others LLVM widens bytes to 64 bits, and takes twenty times as long.
    for j in range(PLANE):
        low = (
            marks[j] | marks[PLANE + j] << 1 | marks[2 * PLANE + j] << 2 | marks[3 * PLANE + j] << 3
        )
        high = (
            marks[4 * PLANE + j]
            | marks[5 * PLANE + j] << 1
            | marks[6 * PLANE + j] << 2
            | marks[7 * PLANE + j] << 3
        )
        bits[j] = np.uint8(low | high << 4)


@_loop
def thin(x: Array, bits: Array, first: Any) -> None:
    """Multiply elements by their marks, in place: one, or zero.

    first: the place of x[0] among the bits.
    """
    done = 0
    while done < x.size:
        inside = (first + done) % CHUNK
        byte = (first + done) // CHUNK * PLANE + inside % PLANE
        run = min(PLANE - inside % PLANE, x.size - done)
        which = np.int32(1) << np.int32(inside // PLANE)
        _multiply(bits, np.uint64(byte), which, x, np.uint64(done), np.uint64(run))
        done += run


@_loop
def _multiply(bits: Array, byte: Any, which: Any, x: Array, at: Any, run: Any) -> None:
    # Places rather than slices: to count a slice's owners takes longer than so short a loop.
    for i in range(run):
        marked = np.int32(np.int32(bits[byte + i]) & np.int32(which)) != np.int32(0)
        x[at + i] *= np.float32(1.0) if marked else np.float32(0.0)


# --- a few marks among many, found without a branch that the processor guesses wrong


@_loop
def places_of(marks: Array, hits: Array, places: Array) -> int:
    """List where the ones lie among zeros and ones, in order; how many are there?

    marks: a multiple of eight. hits: scratch for an eighth as many and one more. places: room for
    as many as there are marks.
    """
    words = marks.view(np.uint64)
    n = np.uint32(0)
    for w in range(np.uint32(words.size)):
        hits[n] = w
        n += np.uint32(words[w] != np.uint64(0))
    found = np.uint32(0)
    for h in range(n):
        word = words[hits[h]]
        while word != np.uint64(0):
            lowest = word & (~word + np.uint64(1))
            places[found] = np.uint64(hits[h]) * np.uint64(8) + ((lowest * _BYTES) >> np.uint64(56))
            found += np.uint32(1)
            word &= word - np.uint64(1)
    return int(found)
