"""From merged blocks to 8-bit codes: blocks of 128 rows and columns, each with its scale.

The grid that merges are computed on knows nothing of these blocks, so rows wait here until 128 of
them, or the last of their matrix, are there. What comes out depends on the values alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distmerge.checkpoints.scales import BLOCK
from distmerge.expressions.compute_pool import ComputePool
from distmerge.plan.eight_bit import scale_shape

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Coder:
    """Codes one tensor, given its values from first to last."""

    def __init__(self, shape: tuple[int, ...], pool: ComputePool) -> None:
        self._height, self._width = shape[-2], shape[-1]
        self._across = scale_shape(shape)[-1]
        self.scales = torch.empty(scale_shape(shape), dtype=torch.float32)
        self._flat = self.scales.view(-1, self._across)
        self._pool = pool
        self._waiting = torch.empty(0)
        self._row = 0
        """The first row that waits."""
        self._tile = 0

    def take(self, values: list[Tensor]) -> list[Tensor]:
        """The codes, as bytes, of the rows that these values complete."""
        data = torch.cat([self._waiting, *(value.to("cpu", torch.float32) for value in values)])
        tiles = list(self._complete(len(data)))
        used = tiles[-1][1][1] if tiles else 0
        coded = self._pool.map(lambda at: self._code(at[0], data[slice(*at[1])]), tiles)
        self._waiting = data[used:].clone()
        return coded

    def _complete(self, elements: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """The tiles whose rows are all there, by their number and their run of the values."""
        start = 0
        while True:
            rows = min(BLOCK[0], self._height - self._row % self._height)
            stop = start + rows * self._width
            if not self._width or stop > elements:
                return
            yield self._tile, (start, stop)
            self._row, self._tile, start = self._row + rows, self._tile + 1, stop

    def _code(self, tile: int, values: Tensor) -> Tensor:
        rows = values.view(-1, self._width)
        codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn)
        for column in range(self._across):
            first = column * BLOCK[1]
            block = rows[:, first : first + BLOCK[1]]
            largest = float(block.abs().max())
            scale = torch.tensor(largest / LARGEST if largest else 1.0, dtype=torch.float32)
            if not scale:  # so small that its 448th part is none
                scale = torch.tensor(torch.finfo(torch.float32).tiny)
            self._flat[tile, column] = scale
            codes[:, first : first + BLOCK[1]] = (block / scale).clamp_(-LARGEST, LARGEST)
        return codes.view(-1).view(torch.uint8)
