"""Locks on files and on ranges of them, which end with the open file, so with its process too.

They hold between open files, not processes: threads that open a file each exclude one another.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from typing import IO, Any

_SET_AND_WAIT: int | None = getattr(fcntl, "F_OFD_SETLKW", None)
_FLOCK = struct.Struct("hhqqi4x")
"""Linux's on 64 bits: kind, from where, start, length, process."""


def lock_range(file: IO[Any] | int, start: int, length: int) -> None:
    """Wait for bytes of a file and hold them; for the whole file where ranges can't be locked."""
    wanted = _FLOCK.pack(fcntl.F_WRLCK, 0, start, length, 0)
    if _SET_AND_WAIT is not None:
        try:
            fcntl.fcntl(file, _SET_AND_WAIT, wanted)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
    fcntl.flock(file, fcntl.LOCK_EX)


def share(file: IO[Any]) -> None:
    """Hold a file together with others that share it."""
    fcntl.flock(file, fcntl.LOCK_SH)


def try_alone(file: IO[Any]) -> bool:
    """Hold a file that nobody else holds. False if somebody does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
