"""The boundary between a merge's events and programs: one JSON object a line."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from distmerge.errors import OutputError
from distmerge.run.events import Event, Listener


class JsonWatcher:
    """One JSON object a line for every event."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Write it."""
        with self._lock:
            print(event.json(), file=self._stream, flush=True)


@contextmanager
def output_of_its_own() -> Iterator[TextIO]:
    """Standard output for the `with` block alone: what else is printed meanwhile, by a method or
    by a library in whatever language, goes to standard error.

    Ray's own threads print there when a node dies, past Python's `sys.stdout`.
    """
    sys.stdout.flush()
    try:
        printed, told = sys.stdout.fileno(), sys.stderr.fileno()
    except (io.UnsupportedOperation, AttributeError):  # they are no files of the system
        yield sys.stdout
        return
    own = os.dup(printed)
    os.dup2(told, printed)
    try:
        with open(own, "w", encoding="utf-8", closefd=False) as stream:
            yield stream
    finally:
        sys.stdout.flush()
        os.dup2(own, printed)
        os.close(own)


def _unwritable(path: str, error: OSError | ValueError) -> OutputError:
    reason = error.strerror if isinstance(error, OSError) else error
    return OutputError(
        f"The event log {path} can't be written: {reason}.",
        fix="name a file in a folder of this machine that exists and has room",
    )


@contextmanager
def logged(path: str | None, listener: Listener) -> Iterator[Listener]:
    """A listener that also appends every event to a file, as it happens: a run that goes on from
    a killed one goes on with its log. Without a path, the listener itself.

    Raises
        OutputError: the file can't be opened.
    """
    if path is None:
        yield listener
        return
    try:
        file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 - closed below
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
