"""The boundary between a merge's events and a file of this machine that a person named for them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from distmerge.checkpoints.tensors import Checkpoint
from distmerge.errors import OutputError
from distmerge.run.events import Event, Listener
from distmerge.run.json_lines import JsonWatcher
from distmerge.write.publish import check_outside

_STREAM = re.compile(r"/dev/(?:null|stdout|stderr|fd/\d+)|/proc/self/fd/\d+")
"""What a shell gives in the place of a file."""
_BEGINNING = b'{"event": "'
"""Of every log of events."""


def _unwritable(path: str, error: OSError | ValueError) -> OutputError:
    reason = error.strerror if isinstance(error, OSError) else error
    return OutputError(
        f"The event log {path} can't be written: {reason}.",
        fix="name a file in a folder of this machine that exists and has room",
    )


def check_event_log(path: str, models: Iterable[Checkpoint]) -> None:
    """Raises OutputError if a file is there that is no log of events, or the place is a model's."""
    if _STREAM.fullmatch(path):
        return
    check_outside(path, "The event log", models)
    if not os.path.exists(path):
        return
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for its reader
        raise _unwritable(path, ValueError("it is a folder, a pipe or a device"))
    with open(path, "rb") as file:
        begins = file.read(len(_BEGINNING))
    if begins not in (b"", _BEGINNING):
        raise OutputError(
            f"{path} is there already and isn't an event log, so nothing is appended to it.",
            fix="name a new file, or the log of an earlier run",
        )


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for whoever reads a pipe."""
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    os.set_blocking(descriptor, True)
    return descriptor


@contextmanager
def logged(
    path: str | None, listener: Listener, models: Iterable[Checkpoint] = ()
) -> Iterator[Listener]:
    """A listener that also appends every event to a file, as it happens: a run that goes on from
    a killed one goes on with its log. Without a path, the listener itself.

    models: none of whose folders the file may be in.

    Raises
        OutputError: the file can't be opened, or isn't one to append to.
    """
    if path is None:
        yield listener
        return
    try:
        check_event_log(path, models)
        file = open(path, "a", encoding="utf-8", opener=_at_once)  # noqa: SIM115 - closed below
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error
    try:
        log = JsonWatcher(file)

        def both(event: Event) -> None:
            try:
                log(event)
            except OSError as error:
                raise _unwritable(path, error) from error
            listener(event)

        yield both
    finally:
        with suppress(OSError):  # of a line that couldn't be written, which has been told
            file.close()
