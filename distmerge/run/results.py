"""From merged blocks to a shard's bytes: rounding, and what was noticed on the way."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmerge.checkpoints.tensors import DTYPE_BYTES
from distmerge.expressions.alignment import TORCH_DTYPES
from distmerge.expressions.compute_pool import ComputePool
from distmerge.methods.fusion import flat, fused_for
from distmerge.methods.operands import bits
from distmerge.methods.unrounded import Unrounded, allow_unrounded
from distmerge.plan.eight_bit import CODES
from distmerge.plan.memory import CODING
from distmerge.plan.work import KeyTask
from distmerge.run.eight_bit import Coder
from distmerge.write.shard import ShardWriter

Item = tuple[int, int]
"""A task of the unit and one of its blocks."""
Produce = Callable[[int, int], Any]
"""A block's result, flat: in the arithmetic's dtype, or already in the output's, or `Unrounded`."""
BaseBlock = Callable[[int, int], Tensor | None]
"""The base's raw elements of a block, where lost deltas are to be counted."""


@dataclass
class Tally:
    """Counts over the elements written."""

    changed: int = 0
    lost: int = 0
    non_finite: dict[str, int] = field(default_factory=dict)
    """Key -> blocks in which the result holds NaN or infinity."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, key: str, value: Tensor, out: Tensor, base: Tensor | None) -> None:
        """Look at a block's result, the bytes written for it and the base's bytes."""
        finite = _stays_finite(value, out.dtype)
        changed, lost = (0, 0) if base is None else _changes(value, out, base)
        self._add(key, finite, changed, lost)

    def round(self, key: str, value: Tensor | Unrounded, out: Tensor, base: Tensor | None) -> bool:
        """Round float32 to bfloat16 and note what `note` would, in one pass; False where there is
        no such loop."""
        if out.dtype != torch.bfloat16:
            return False
        known = None if base is None or base.dtype != torch.bfloat16 else bits(base)
        if isinstance(value, Unrounded):
            self._add(key, *value.round(bits(out), known))
            return True
        fused = fused_for(value)
        if fused is None:
            return False
        exact = flat(value).view(np.int32)
        if known is not None:
            self._add(key, *fused.round_and_count(exact, bits(out), known))
        else:
            finite = fused.round_to_bfloat16(exact, bits(out))
            self._add(key, finite, *((0, 0) if base is None else _changes(value, out, base)))
        return True

    def _add(self, key: str, finite: bool, changed: int, lost: int) -> None:
        if changed or not finite:
            with self._lock:
                self.changed += changed
                self.lost += lost
                if not finite:
                    self.non_finite[key] = self.non_finite.get(key, 0) + 1


def _stays_finite(value: Tensor, dtype: torch.dtype) -> bool:
    """One pass: a NaN propagates into the extremes, an overflow is theirs first."""
    if not value.is_floating_point() or not value.numel():
        return True
    extremes = torch.stack(torch.aminmax(value)).to(dtype).float()
    return all(map(math.isfinite, extremes.tolist()))


def _changes(value: Tensor, out: Tensor, base: Tensor) -> tuple[int, int]:
    """How many results differ from the base, and how many of these no longer do once rounded."""
    differs = value != base.to(value.dtype)
    return int(differs.sum()), int((differs & (out == base.to(out.dtype))).sum())


ROUNDING = frozenset({"F16", "BF16"})
"""Output dtypes that can lose what float32 arithmetic found."""


class OpenWindows:
    """The writer's windows while threads fill them: one begins the next while another is still at
    this one, and each is written once it is full, in order."""

    def __init__(self, writer: ShardWriter, blocks: list[int], sizes: Sequence[int]) -> None:
        """blocks, sizes: of each window, how many blocks are still to come, and bytes."""
        self._writer = writer
        self._left = blocks
        self._sizes = sizes
        self._windows: list[Tensor] = []
        self._written = 0
        self._broken = False
        self._opening, self._counting = threading.Lock(), threading.Lock()

    def open(self, number: int) -> Tensor | None:
        """A window to fill. The first to ask for it waits until there is one, and who asks for a
        later one waits behind. None if a block has failed: nobody will want the rest."""
        if number >= len(self._windows):
            with self._opening:
                while number >= len(self._windows):
                    if self._broken:
                        return None
                    try:
                        self._windows.append(self._writer.buffer())
                    except BaseException:
                        self._broken = True  # before the next one waits for a window
                        raise
        return self._windows[number]

    def break_off(self) -> None:
        """A block has failed, so its window won't be full: let go of whoever waits for room."""
        self._broken = True
        with self._counting:
            for window in self._windows[self._written :]:
                self._writer.write(window, 0)

    def filled(self, number: int) -> None:
        """One more of its blocks is there."""
        with self._counting:
            self._left[number] -= 1
            while self._written < len(self._windows) and not self._left[self._written]:
                self._writer.write(self._windows[self._written], self._sizes[self._written])
                self._written += 1


class BlockWriter:
    """Fills the writer's windows with blocks, side by side, in file order."""

    def __init__(
        self,
        tasks: Sequence[KeyTask],
        writer: ShardWriter,
        pool: ComputePool,
        tally: Tally,
        window: int,
    ) -> None:
        self._tasks = tasks
        self._writer = writer
        self._pool = pool
        self._tally = tally
        self._window = window
        self._coders: dict[str, Coder] = {}

    def write(self, items: Sequence[Item], produce: Produce, base: BaseBlock) -> int:
        """Produce and queue the blocks; the number of bytes."""
        written = 0
        for task, run in itertools.groupby(items, self.coded):
            if task is None:
                written += self._write_blocks(list(run), produce, base)
            else:
                written += self._write_codes(task, [block for _, block in run], produce)
        return written

    def coded(self, item: Item) -> int | None:
        """The task, if it is written in 8 bits."""
        return item[0] if self._tasks[item[0]].dtype == CODES else None

    def scales(self, key: str) -> Tensor:
        """What the codes of a key, all of them written, have to be multiplied by."""
        return self._coders[key].scales

    def _write_codes(self, task: int, blocks: Sequence[int], produce: Produce) -> int:
        key, grid = self._tasks[task].program.key, self._tasks[task].grid
        coder = self._coders.setdefault(key, Coder(grid.shape, self._pool))
        count = max(1, CODING // max(grid.step, 1))
        written = 0
        for at in range(0, len(blocks), count):
            made = self._pool.map(partial(produce, task), blocks[at : at + count])
            for value in made:
                self._tally.note(key, value, value, None)
            for codes in coder.take(made):
                written += self._write_bytes(codes)
        return written

    def _write_bytes(self, data: Tensor) -> int:
        for start in range(0, len(data), self._window):
            piece = data[start : start + self._window]
            window = self._writer.buffer()
            window[: len(piece)] = piece
            self._writer.write(window, len(piece))
        return len(data)

    def _write_blocks(self, items: Sequence[Item], produce: Produce, base: BaseBlock) -> int:
        batches = list(self.batches(items))
        sizes = [batch[-1][1] + self.nbytes(batch[-1][0]) for batch in batches]
        windows = OpenWindows(self._writer, list(map(len, batches)), sizes)

        def fill(placed: tuple[int, tuple[Item, int]]) -> None:
            number, ((task, block), offset) = placed
            try:
                with allow_unrounded(True):
                    value = produce(task, block)
                before = base(task, block)
                if (window := windows.open(number)) is not None:
                    self.fill(window, offset, task, value, before)
                    windows.filled(number)
            except BaseException:  # others may wait for its window, and the pool for them
                windows.break_off()
                raise

        try:
            self._pool.map(fill, [(n, one) for n, batch in enumerate(batches) for one in batch])
        except BaseException:  # an interrupt comes to this thread alone
            windows.break_off()
            raise
        return sum(sizes)

    def batches(self, items: Sequence[Item]) -> Iterator[list[tuple[Item, int]]]:
        """Runs of blocks that fill a window, each with its offset in it."""
        batch: list[tuple[Item, int]] = []
        filled = 0
        for item in items:
            size = self.nbytes(item)
            if batch and filled + size > self._window:
                yield batch
                batch, filled = [], 0
            batch.append((item, filled))
            filled += size
        if batch:
            yield batch

    def nbytes(self, item: Item) -> int:
        """Of a block in the output."""
        task = self._tasks[item[0]]
        start, stop = task.grid.span(item[1])
        return (stop - start) * DTYPE_BYTES[task.dtype]

    def fill(
        self, window: Tensor, offset: int, number: int, value: Any, base: Tensor | None
    ) -> None:
        """Round a block of a task, a tensor or `Unrounded`, into a window."""
        task = self._tasks[number]
        item = DTYPE_BYTES[task.dtype]
        dtype = TORCH_DTYPES[task.dtype]
        if isinstance(value, Unrounded):
            alike = dtype == torch.bfloat16 and (base is None or base.dtype == dtype)
            if not alike or offset % item:
                value = value.computed().reshape(-1)
        place = window[offset : offset + value.numel() * item]
        if offset % item == 0:
            out = place.view(dtype)
            if self._tally.round(task.program.key, value, out, base):
                return
            out.copy_(value)
        else:  # a wider dtype behind a narrower one: rounded apart, copied as bytes
            out = value.to("cpu", dtype)
            place.copy_(out.contiguous().view(torch.uint8))
        self._tally.note(task.program.key, value, out, base)
