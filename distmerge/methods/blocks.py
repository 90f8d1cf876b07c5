"""The canonical grid: how every tensor is cut, whoever merges it and with how much memory.

A tensor is a run of elements in row-major order, a block a contiguous piece of that run. The grid
depends on the shape alone: floating-point results change in their last bit with the width of
the pieces they are computed in, so workers and memory may decide how many blocks are in flight
but never where a block ends.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

BLOCK_ELEMENTS = 1 << 18
"""Elements of a full block: 1 MiB in float32, so that a handful of operands stays in a core's
L2 cache while a method's operations pass over them one by one."""
CHUNK = 1024
"""Elements whose intermediate results fit into the first-level cache together: the fused loops take
them one after the other."""
WIDEST_BLOCK = 4 * BLOCK_ELEMENTS
FEWEST_WIDE = 4
"""Wide blocks that a tensor has at least for each thread, so that all get equal shares."""

Granularity = Literal["whole", "rows", "elements"]
"""What a method must see at once: the whole tensor, whole rows (a row is the last dimension; a
one-dimensional tensor is one row), or any run of elements."""


@dataclass(frozen=True)
class Grid:
    """Blocks of one tensor shape.

    A block holds as many whole rows as fit into `block` elements; a row longer than that is cut
    into pieces of `block` elements, anew for every row.
    """

    shape: tuple[int, ...]
    block: int = BLOCK_ELEMENTS

    @functools.cached_property
    def elements(self) -> int:
        return math.prod(self.shape)

    @functools.cached_property
    def row(self) -> int:
        """Elements of one row."""
        return self.shape[-1] if self.shape else 1

    @functools.cached_property
    def whole_rows(self) -> bool:
        """Do blocks consist of whole rows?"""
        return self.row <= self.block

    @functools.cached_property
    def step(self) -> int:
        """Elements of a full block."""
        if not self.row:
            return 1
        return self.block // self.row * self.row if self.whole_rows else self.block

    def __len__(self) -> int:
        if self.whole_rows:
            return math.ceil(self.elements / self.step)
        return self.elements // self.row * math.ceil(self.row / self.step)

    def span(self, index: int) -> tuple[int, int]:
        """First element of block `index` and one past its last."""
        if self.whole_rows:
            start = index * self.step
            return start, min(start + self.step, self.elements)
        pieces = math.ceil(self.row / self.step)
        row, piece = divmod(index, pieces)
        start = row * self.row + piece * self.step
        return start, min(start + self.step, (row + 1) * self.row)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return map(self.span, range(len(self)))

    def streams(self, granularity: Granularity) -> bool:
        """Can a method of this granularity be given these blocks one by one?"""
        if granularity == "whole":
            return len(self) <= 1
        return granularity == "elements" or self.whole_rows

    def view(self, span: tuple[int, int], granularity: Granularity) -> tuple[int, ...]:
        """Shape under which a method of this granularity sees a block: rows x their length for
        rows, whatever the tensor's dimensions and however many blocks it has."""
        start, stop = span
        if granularity == "rows" and len(self.shape) > 1:
            return (stop - start) // self.row, self.row
        return self.shape if stop - start == self.elements else (stop - start,)


@functools.lru_cache(maxsize=4096)  # models have few shapes and many tensors
def grid_of(shape: tuple[int, ...], block: int = BLOCK_ELEMENTS) -> Grid:
    """`Grid`, which has worked out what it is asked for again and again."""
    return Grid(shape, block)


@functools.lru_cache(maxsize=4096)
def wide_block(shape: tuple[int, ...], threads: int) -> int:
    """Elements of a block of a tensor for methods that are seamless: they give the same bits
    however many of the grid's blocks are done in one go. Their loops keep to the cache by
    themselves, and each call from Python costs 0.5 to 1 ms. Many threads want narrow ones, to find
    enough in what is read together."""
    grid = Grid(shape)
    widest = min(WIDEST_BLOCK, 4 * WIDEST_BLOCK // threads)
    width = min(widest, grid.elements // (FEWEST_WIDE * threads)) // grid.step * grid.step
    joins_rows = not grid.whole_rows and grid.row <= width
    return BLOCK_ELEMENTS if joins_rows or width <= grid.step else width
