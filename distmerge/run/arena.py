"""One ring of memory for all raw inputs of a worker.

Reads are handed out and given back in order, so a ring fits them without fragmentation; its pages
are touched once instead of at every allocation, and the worker's input memory is bounded by its
size, whatever the tensors are.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from dataclasses import dataclass

ALIGN = 64


@dataclass(eq=False, slots=True)
class Lease:
    """A piece of the ring in use."""

    view: memoryview
    _start: int
    _stop: int
    _done: bool = False


class Arena:
    """`take` from one thread, `give_back` from another; oldest leases free their room first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Private: what is shared with other processes seldom gets large pages.
            memory = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
        else:
            memory = mmap.mmap(-1, capacity)
        self._view = memoryview(memory)
        self._leases: deque[Lease] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def take(self, size: int, phase: int = 0) -> Lease | None:
        """`size` bytes whose address is `phase` modulo 64, waiting until they are free.

        None if the arena was closed meanwhile. A request for more than half the capacity may
        never be met.
        """
        with self._changed:
            while True:
                if self._closed:
                    return None
                start = self._room(size, phase % ALIGN)
                if start is not None:
                    lease = Lease(self._view[start : start + size], start, start + size)
                    self._leases.append(lease)
                    return lease
                self._changed.wait()

    def _room(self, size: int, phase: int) -> int | None:
        if not self._leases:
            return phase if phase + size <= self.capacity else None
        oldest, newest = self._leases[0]._start, self._leases[-1]._stop
        start = -(-(newest - phase) // ALIGN) * ALIGN + phase
        if newest > oldest:
            if start + size <= self.capacity:
                return start
            start, newest = phase, 0
        return start if start + size <= oldest and start >= newest else None

    def give_back(self, lease: Lease) -> None:
        """The lease's memory may be used again."""
        with self._changed:
            lease._done = True
            while self._leases and self._leases[0]._done:
                self._leases.popleft()
            self._changed.notify_all()

    def close(self) -> None:
        """Wake a waiting `take` with None, and let go of the memory: it goes with the last lease,
        not when Python's collector comes to whoever held the arena."""
        with self._changed:
            self._closed = True
            self._leases.clear()
            self._view = memoryview(b"")
            self._changed.notify_all()
