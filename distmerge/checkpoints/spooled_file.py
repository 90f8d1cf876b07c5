"""One file of a spool: bytes at their own places in a sparse file, and a list of what is there.

A line of the list is `FIRST END.`, written at once after the bytes; one that is cut short says
nothing.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from distmerge.checkpoints.file_locks import lock_range
from distmerge.checkpoints.ranges import Covered, Span

DATA, LIST = ".data", ".ranges"
_LINE = re.compile(rb"(\d+) (\d+)\.")
Fetch = Callable[[int, memoryview], None]
"""Fills a buffer with the file's bytes from an offset on, from the store."""
HasRoom = Callable[[int], bool]
"""May so many bytes more be kept?"""


class SpooledFile:
    """Shared by this process's threads; other processes have their own of the same file.

    The spool is a help: whatever goes wrong with it, bytes come from the store.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._data, self._list = path.with_name(path.name + DATA), path.with_name(path.name + LIST)
        self._size = size
        self._there = Covered()
        self._known = 0
        """Bytes of the list that have been read."""
        self._lock = threading.Lock()

    def read(self, start: int, view: memoryview, fetch: Fetch, has_room: HasRoom) -> None:
        """Fill `view` with the bytes from `start` on. Raises what `fetch` raises."""
        stop = start + len(view)
        if self._missing(start, stop):
            opened = self._open_locked(start, len(view))
            if opened is None:
                fetch(start, view)
                return
            try:
                missing = self._missing_now(start, stop)
                for first, end in missing:
                    piece = view[first - start : end - start]
                    fetch(first, piece)
                    if has_room(len(piece)):
                        self._keep(opened, first, piece)
            finally:
                os.close(opened)
        else:
            missing = []
        for first, end in _others(start, stop, missing):
            piece = view[first - start : end - start]
            if not self._read_here(first, piece):
                fetch(first, piece)

    def _missing(self, start: int, stop: int) -> list[Span]:
        with self._lock:
            return self._there.missing(start, stop)

    def _missing_now(self, start: int, stop: int) -> list[Span]:
        """After a look at what others have listed meanwhile."""
        with self._lock:
            with suppress(FileNotFoundError), self._list.open("rb") as file:
                file.seek(self._known)
                new = file.read()
                for line in new.split(b"\n"):
                    if found := _LINE.fullmatch(line):
                        self._there.add(int(found[1]), int(found[2]))
                self._known += new.rfind(b"\n") + 1  # the last line may still be written
            return self._there.missing(start, stop)

    def _open_locked(self, start: int, length: int) -> int | None:
        """The file with these bytes locked until it is closed; None if that can't be had."""
        try:
            opened = os.open(self._data, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            if os.fstat(opened).st_size < self._size:
                os.ftruncate(opened, self._size)
            lock_range(opened, start, length)
        except OSError:
            os.close(opened)
            return None
        return opened

    def _keep(self, opened: int, start: int, piece: memoryview) -> None:
        try:
            done = 0
            while done < len(piece):
                done += os.pwrite(opened, piece[done:], start + done)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            listing = os.open(self._list, flags, 0o600)
            try:
                os.write(listing, b"\n%d %d." % (start, start + len(piece)))
            finally:
                os.close(listing)
        except OSError:
            return  # no room, or removed: it will be fetched again
        with self._lock:
            self._there.add(start, start + len(piece))

    def _read_here(self, start: int, piece: memoryview) -> bool:
        try:
            with self._data.open("rb", buffering=0) as file:
                file.seek(start)
                done = 0
                while done < len(piece):
                    got = file.readinto(piece[done:])
                    if not got:
                        return False
                    done += got
        except OSError:
            return False
        return True


def _others(start: int, stop: int, spans: list[Span]) -> list[Span]:
    """What lies between these spans of a range."""
    ends = [start, *(at for span in spans for at in span), stop]
    return [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if a < b]
