"""The boundary between a merge's events and the people or programs that watch them.

On a terminal a bar; into a file or a pipe, a plain line every few seconds; for programs, one JSON
object a line. Every listener may be called from several threads.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

from distmerge import errors
from distmerge.credentials import redact
from distmerge.plan.sizes import format_size
from distmerge.run.events import Event, Listener, silent
from distmerge.run.json_lines import JsonWatcher, output_of_its_own

INTERVAL = 5.0
"""Seconds between plain lines."""
WINDOW = 30.0
"""Seconds over which rates are averaged."""


@dataclass
class Tally:
    """How far a merge is, from its events and the clock."""

    clock: Callable[[], float] = time.monotonic
    units: int = 0
    """Units in all."""
    done: int = 0
    """Units that are finished, those of an earlier run included."""
    bytes_in: int = 0
    """To be read by this run."""
    bytes_out: int = 0
    """To be written by this run."""
    read: int = 0
    written: int = 0
    nodes: dict[str, int] = field(default_factory=dict)
    """Bytes that each node of a cluster has moved."""
    _started: float = 0.0
    _samples: deque[tuple[float, int, int]] = field(default_factory=deque)

    def note(self, event: Event) -> None:
        """Take a plan, unit or progress event in."""
        data = event.data
        if event.kind == "plan":
            self.units, self.done = data.get("units", 0), data.get("resumed", 0)
            self.bytes_in, self.bytes_out = data.get("bytes_in", 0), data.get("bytes_out", 0)
            self._started = self.clock()
            self._samples.append((self._started, 0, 0))
        elif event.kind == "unit":
            self.done, self.units = data["done"], data["total"]
        elif event.kind == "progress":
            self.read += data.get("bytes_read", 0)
            self.written += data.get("bytes_written", 0)
            if "node" in data:
                moved = data.get("bytes_read", 0) + data.get("bytes_written", 0)
                self.nodes[data["node"]] = self.nodes.get(data["node"], 0) + moved
            now = self.clock()
            self._samples.append((now, self.read, self.written))
            while len(self._samples) > 2 and self._samples[1][0] < now - WINDOW:
                self._samples.popleft()

    @property
    def rates(self) -> tuple[float, float]:
        """Bytes read and written per second, lately."""
        if not self._samples:
            return 0.0, 0.0
        then, read, written = self._samples[0]
        seconds = self.clock() - then
        if seconds <= 0:
            return 0.0, 0.0
        return (self.read - read) / seconds, (self.written - written) / seconds

    @property
    def share(self) -> float:
        """Of the bytes that this run moves, how many have been, 0 to 1."""
        total = self.bytes_in + self.bytes_out
        return min(1.0, (self.read + self.written) / total) if total > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None as long as nothing has moved."""
        rate, moved = sum(self.rates), self.read + self.written
        if rate <= 0 or not 0 < self.share < 1:
            return None
        return moved * (1.0 / self.share - 1.0) / rate

    @property
    def node_rates(self) -> dict[str, float]:
        """Bytes that each node reads and writes per second, over the whole run; fastest first."""
        seconds = max(self.clock() - self._started, 1e-9)
        fastest = sorted(self.nodes.items(), key=lambda node: -node[1])
        return {node: moved / seconds for node, moved in fastest}

    def __str__(self) -> str:
        read, written = self.rates
        parts = [
            f"{self.done}/{self.units} shards",
            f"{format_size(self.read)} read ({format_size(int(read))}/s)",
            f"{format_size(self.written)} written ({format_size(int(written))}/s)",
        ]
        if len(rates := list(self.node_rates.items())) > 1:
            named = [f"{node} {format_size(int(rate))}/s" for node, rate in (rates[0], rates[-1])]
            parts.append(f"{len(rates)} nodes, from {named[0]} to {named[1]}")
        if self.seconds_left is not None:
            parts.append(f"{format_seconds(self.seconds_left)} left")
        return ", ".join(parts)


def format_seconds(seconds: float) -> str:
    """`45 s`, `2:05 min`, `1:02:05 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def summary(data: dict[str, Any]) -> list[str]:
    """The sentences that end a merge, from the `done` event's data."""
    size = format_size(data.get("bytes_written", 0))
    lines = [
        f"{data.get('tensors', 0)} tensors, {size}, in {format_seconds(data.get('seconds', 0.0))}: "
        f"{data.get('url')}"
    ]
    lost = data.get("lost_delta_share")
    if lost is not None:
        lines.append(f"{lost:.1%} of what the merge changed was lost to rounding.")
    return lines


class Watcher(Protocol):
    """A listener that holds something open."""

    def __call__(self, event: Event) -> None:
        """Hear of an event."""
        ...

    def close(self) -> None:
        """Leave the screen as a shell wants it; safe to call twice."""
        ...


class LineWatcher:
    """Plain text, without control characters: a line when something happens, and one every few
    seconds while bytes move."""

    def __init__(
        self,
        stream: TextIO,
        *,
        told: Iterable[str] = (),
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._interval = interval
        self._clock = clock
        self._tally = Tally(clock)
        self._told = set(told)
        self._last = clock()
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Show it."""
        with self._lock:
            self._tally.note(event)
            if event.kind == "progress":
                now = self._clock()
                if now - self._last >= self._interval:
                    self._last = now
                    self._say(str(self._tally))
            for sentence in sentences(event, self._told):
                self._say(sentence)

    def close(self) -> None:
        """Nothing is open."""

    def _say(self, text: str) -> None:
        print(printable(text), file=self._stream, flush=True)


class BarWatcher:
    """A progress bar on a terminal; sentences scroll above it."""

    def __init__(self, stream: TextIO, *, told: Iterable[str] = ()) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._tally = Tally()
        self._told = set(told)
        self._console = Console(file=stream, highlight=False)
        self._bar = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %  {task.description}"),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=1.0, visible=False)
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Show it."""
        with self._lock:
            self._tally.note(event)
            if event.kind == "plan":
                self._bar.start()
            if event.kind == "done":
                self._bar.stop()
            elif self._tally.units:
                self._bar.update(
                    self._task,
                    completed=self._tally.share,
                    description=str(self._tally),
                    visible=True,
                )
            for sentence in sentences(event, self._told):
                self._console.print(printable(sentence), markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar off the screen."""
        self._bar.stop()


def sentences(event: Event, told: set[str]) -> Iterator[str]:
    """What an event says in words; notices in `told` are not repeated, new ones are added."""
    data = event.data
    for text in [data["text"]] if event.kind == "notice" else data.get("notices", []):
        if text not in told:
            told.add(text)
            yield f"Note: {text}"
    if event.kind == "plan":
        sizes = f"{format_size(data['bytes_in'])} to read, {format_size(data['bytes_out'])}"
        shards = f"{data['units']} shard{'' if data['units'] == 1 else 's'}"
        yield f"{data['tensors']} tensors in {shards}: {sizes} to write."
    elif event.kind == "retry":
        shard, attempt, reason = data["shard"], data["attempt"], data["reason"]
        yield f"Again, attempt {attempt}: {shard}, since {reason}"
    elif event.kind == "stall":
        seconds = format_seconds(data["seconds"])
        yield f"No byte has moved for {seconds}: {data['shard']}, on {data['node']}"
    elif event.kind == "score":
        scores = [f"{name} {value:.6g}" for name, value in data["scores"].items()]
        yield f"{data['candidate']}: {data['error'] or ', '.join(scores)}"
    elif event.kind == "done":
        yield from summary(data)


def printable(text: str) -> str:
    """Lines without control characters and credentials."""
    return errors.printable(redact(text), but="\n")


@contextmanager
def watching(
    *, json: bool = False, quiet: bool = False, told: Iterable[str] = ()
) -> Iterator[Listener]:
    """The listener that suits standard output and error: JSON to the one, or words to the other.

    told: notices that the user has seen already.
    """
    if quiet and not json:
        yield silent
        return
    if json:
        with output_of_its_own() as stream:
            yield JsonWatcher(stream)
        return
    watcher: Watcher
    if is_terminal(sys.stderr):
        watcher = BarWatcher(sys.stderr, told=told)
    else:
        watcher = LineWatcher(sys.stderr, told=told)
    try:
        yield watcher
    finally:
        watcher.close()


def is_terminal(stream: TextIO) -> bool:
    """Whether the stream can show a bar that moves."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"
