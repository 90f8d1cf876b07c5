"""The boundary between a merge's events and programs: one JSON object a line."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from distmerge.run.events import Event


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
