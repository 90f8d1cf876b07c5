"""The boundary between a file being written and the Hub, which takes whole files only.

The bytes wait on this machine's disk, one shard at a time, until the file is whole. A killed
process' file is told from a living one's by its lock, which dies with the process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from distmerge.errors import OutputError
from distmerge.write.local_output import output_error

_PREFIX, _SUFFIX = "distmerge-hub-", ".tmp"


class PendingHubFile:
    """A file in temporary space. Exactly one of `commit` and `discard` ends it."""

    def __init__(self, send: Callable[[str, int], None]) -> None:
        """Begin.

        send: takes the whole file's path on this disk, and its size, to the Hub.
        """
        self._send = send
        self._size = 0
        try:
            number, self._place = tempfile.mkstemp(_SUFFIX, _PREFIX)
            self._file = os.fdopen(number, "wb", buffering=0)
            _lock(number)
        except OSError as error:
            raise _no_space(error) from error

    def write(self, data: memoryview) -> None:
        """Append all of `data`, which may be reused afterwards."""
        view = data.cast("B")
        self._size += len(view)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise _no_space(error) from error

    def commit(self) -> None:
        """Send it, and free the disk."""
        try:
            self._send(self._place, self._size)
        finally:
            self.discard()

    def discard(self) -> None:
        """Free the disk."""
        self._file.close()
        Path(self._place).unlink(missing_ok=True)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.discard()


def free_temporary_space() -> int:
    """Bytes that temporary files may take."""
    import shutil

    return shutil.disk_usage(tempfile.gettempdir()).free


def sweep_temporary_space() -> int:
    """Delete what dead processes of this machine left, and say how many files that was."""
    swept = 0
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):  # somebody else's, or alive
            with path.open("rb+") as file:
                _lock(file.fileno())
                path.unlink()
            swept += 1
    return swept


def _lock(number: int) -> None:
    """Take a file for this process; raises OSError if another one has it."""
    if os.name == "nt":
        return  # there an open file can't be deleted
    import fcntl

    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _no_space(error: OSError) -> OutputError:
    known = output_error(f"the temporary folder {tempfile.gettempdir()}", error)
    fix = "point TMPDIR at a disk with room for a shard, then run the same command again"
    return OutputError(known.headline, *known.facts, fix=fix)
