"""The boundary between a run's events and its output, which keeps them.

While the run lasts the log lies beside its receipts, and so is there when the run failed or was
killed: the same command goes on with it, `distmerge clean` removes it. The last writing puts it
beside the manifest. It is no part of the model: no checksum covers it, and nothing reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from distmerge.checkpoints.store import OutputStore
from distmerge.errors import DistmergeError
from distmerge.run.events import Event, Listener
from distmerge.write.lease import LeaseKeeper
from distmerge.write.shard import STAGING


class EventLog:
    """Collects events, and writes all of them anew where there are new ones.

    Bytes as they move are left out, since each shard's are told at its end: so a log grows with
    the plan and not with the time that it takes.
    """

    def __init__(self, output: OutputStore, digest: str) -> None:
        self._output = output
        self._path = f"{STAGING}/{digest}/events.jsonl"
        self._lines = _lines_of(output, self._path)
        self._kept = len(self._lines)
        self._closed = False
        self._noting, self._writing = threading.Lock(), threading.Lock()

    def __call__(self, event: Event) -> None:
        """Take an event in; the plan is kept at once."""
        if event.kind == "progress":
            return
        line = event.json()
        with self._noting:
            self._lines.append(line)
        if event.kind == "plan":
            self.keep()

    def keep(self, *, closing: bool = False) -> None:
        """Write the log, if there is something new and it isn't closed.

        Raises
            OutputError: the output can't be written.
        """
        with self._writing:
            with self._noting:
                count, text = len(self._lines), self._text()
            if count > self._kept and (closing or not self._closed):
                self._output.write_bytes(self._path, text)
                self._kept = count

    def close(self) -> bytes:
        """All events, one JSON object a line. The run's own file isn't written any more."""
        with self._writing, self._noting:
            self._closed = True
            return self._text()

    def _text(self) -> bytes:
        return "".join(f"{line}\n" for line in self._lines).encode()


@contextmanager
def kept_events(
    output: OutputStore, digest: str, held: LeaseKeeper, listener: Listener
) -> Iterator[tuple[EventLog, Listener]]:
    """The log of a run, kept with each heartbeat of its lease; and who is to be told of events.

    A failure is told too, and kept, unless another run has taken over.
    """
    log = EventLog(output, digest)

    def both(event: Event) -> None:
        log(event)
        listener(event)

    held.at_each_beat(log.keep)
    try:
        yield log, both
    except BaseException as error:
        # Other exceptions may quote anything: their kind has to do.
        text = error.headline if isinstance(error, DistmergeError) else ""
        with suppress(DistmergeError):
            both(Event("failed", {"error": type(error).__name__, "text": text}))
            held.check()
            log.keep(closing=True)
        raise


def _lines_of(output: OutputStore, path: str) -> list[str]:
    """What an earlier run of the same digest kept."""
    try:
        return output.read_bytes(path).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
