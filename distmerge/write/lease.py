"""One run at a time for an output: a heartbeat file that expires.

The lease says who writes. It is renewed while the run lives; one that hasn't been for `EXPIRES`
seconds, or whose process is known to be dead on this machine, is taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import psutil

from distmerge.checkpoints.store import OutputStore
from distmerge.errors import OutputError, OutputLocked

LEASE_FILE = ".distmerge/lease.json"
EXPIRES = 60.0
"""Seconds after the last heartbeat, unless a lease says otherwise."""
MISSED = 6
"""Heartbeats that may be missed in a row."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Who writes an output."""

    owner: str
    host: str
    process: int
    started: float
    """When the process began, seconds since the epoch: process numbers are used again."""
    heartbeat: float
    expires: float = EXPIRES
    """Seconds after the last heartbeat: longer where a heartbeat is dear."""

    @classmethod
    def mine(cls, expires: float) -> Lease:
        now = time.time()
        started = psutil.Process().create_time()
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), started, now, expires)

    def renewed(self) -> Lease:
        return replace(self, heartbeat=time.time())

    def is_held(self) -> bool:
        """Does its owner still write, as far as can be told from here?"""
        if time.time() - self.heartbeat > self.expires:
            return False
        if self.host != socket.gethostname():
            return True
        try:
            owner = psutil.Process(self.process)
            same = abs(owner.create_time() - self.started) < 1.0
            return same and owner.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class LeaseKeeper:
    """Holds an output's lease; `check` before every step that others would see."""

    def __init__(self, output: OutputStore) -> None:
        self._output = output
        self._lease = Lease.mine(MISSED * output.heartbeat)
        self._stop = threading.Event()
        self._at_each_beat: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._beat, name="distmerge-lease", daemon=True)

    def acquire(self) -> None:
        """Take the lease.

        Raises
            OutputLocked: another run holds it.
        """
        began = time.monotonic()
        other = read_lease(self._output)
        if other is not None and other.is_held():
            raise _locked(self._output, other)
        try:
            self._write()
        except OutputError:
            other = read_lease(self._output)
            if other is not None and other.owner != self._lease.owner:
                # A run that was faster has swept this one's temporary file away.
                raise _locked(self._output, other) from None
            raise
        # Of two that saw none and wrote at once, the last one's stays. Whoever looked before this
        # was written has written by now.
        time.sleep(2 * (time.monotonic() - began))
        self.check()
        self._thread.start()

    def at_each_beat(self, action: Callable[[], None]) -> None:
        """Do this too, in the keeper's thread, as long as the lease is held."""
        self._at_each_beat.append(action)

    def check(self) -> None:
        """Raises OutputLocked if another run has taken over, or had while this one slept."""
        found = read_lease(self._output)
        if found is None:
            raise OutputLocked(
                f"This run lost its hold on {self._output.root}: its lease is gone.",
                "another run may have taken over and ended since",
                fix="look at what is there, then run the same command again",
            )
        if found.owner != self._lease.owner:
            raise _locked(self._output, found)

    def release(self) -> None:
        """Stop the heartbeat and remove the lease if it is still this run's."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        found = read_lease(self._output)
        if found is not None and found.owner == self._lease.owner:
            self._output.delete(LEASE_FILE)

    def _write(self) -> None:
        self._lease = self._lease.renewed()
        self._output.write_bytes(LEASE_FILE, json.dumps(asdict(self._lease)).encode())

    def _beat(self) -> None:
        while not self._stop.wait(self._output.heartbeat):
            try:
                found = read_lease(self._output)
                if found is None or found.owner != self._lease.owner:
                    return  # `check` tells the run
                self._write()
                for action in self._at_each_beat:
                    action()
            except OutputError:
                continue  # there are several beats before it expires


@contextlib.contextmanager
def lease(output: OutputStore) -> Iterator[LeaseKeeper]:
    """Hold an output's lease for the length of a `with` block."""
    keeper = LeaseKeeper(output)
    try:
        keeper.acquire()
        yield keeper
    finally:
        keeper.release()


def read_lease(output: OutputStore) -> Lease | None:
    """The lease that lies in the output, if a readable one does."""
    try:
        return Lease(**json.loads(output.read_bytes(LEASE_FILE)))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def _locked(output: OutputStore, other: Lease) -> OutputLocked:
    age = time.time() - other.heartbeat
    return OutputLocked(
        f"Another run is writing {output.root}.",
        f"process {other.process} on {other.host}, last heard of {age:.0f} s ago",
        fix=f"wait for it, or stop it; a dead run's hold ends after {other.expires:.0f} s",
    )
