"""A file that is written past the page cache, where the disk allows it.

Shards are written once and not read again soon. Through the page cache their bytes are copied into
fresh pages, which must be found, cleared and later written back, all counted against a container's
memory; `python -m benchmarks` shows what that costs. Directly, they go to the disk from one buffer.
"""

from __future__ import annotations

import mmap
import os

import numpy as np

BUFFER = 4 << 20
"""Bytes that go to the disk at a time: a multiple of any sector, in memory aligned to pages."""


class DirectFile:
    """A new file; what is written may be reused afterwards. `close` without `sync` loses its end.

    Raises
        OSError: as `open` and `write` do.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._buffer = mmap.mmap(-1, BUFFER)
        self._view = np.frombuffer(self._buffer, np.uint8)
        self._filled = 0
        self._direct = self._turn(os.O_DIRECT, on=True)

    def _turn(self, flag: int, *, on: bool) -> bool:
        """Set or clear a flag of the open file; False where the disk can't do it."""
        import fcntl  # there on POSIX alone, as O_DIRECT is on Linux

        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | flag if on else flags & ~flag)
        except OSError:  # some file systems, tmpfs among them
            return False
        return True

    def write(self, data: memoryview) -> None:
        """Append all of `data`, bytes."""
        while data:
            part = data[: BUFFER - self._filled]
            # By numpy, which lets other threads have Python's lock meanwhile.
            np.copyto(self._view[self._filled : self._filled + len(part)], part)
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == BUFFER:
                self._drain()

    def _drain(self) -> None:
        done = 0
        while done < self._filled:
            if self._direct and (self._filled - done) % mmap.PAGESIZE:
                # The end of the file, or of a write that was cut short: no whole pages.
                self._direct = not self._turn(os.O_DIRECT, on=False)
            done += os.write(self._descriptor, self._view[done : self._filled].data)
        self._filled = 0

    def sync(self) -> None:
        """Make everything durable."""
        self._drain()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Give memory and descriptor back; a second time does nothing."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        self._view = self._view[:0].copy()
        self._buffer.close()
