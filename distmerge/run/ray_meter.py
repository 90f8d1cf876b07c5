"""What running workers have moved so far, and whether they move anything at all.

The driver asks: one small question to a busy worker every so often, and none before the last one
is answered. So the number of messages is bounded by the time, whatever units do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from distmerge.plan.work import WorkUnit
from distmerge.run.bundle import Bundle
from distmerge.run.events import Event, Listener
from distmerge.run.ray_actors import Actor
from distmerge.run.ray_metrics import Metrics
from distmerge.run.ray_worker import Moved

LOOK = 2.0
"""Seconds between two looks at a worker, on a cluster with few."""
SHARE = 0.02
"""Seconds between two questions, on one with many."""
STALL = 60.0
"""Seconds without a byte after which a unit is said to stall."""


@dataclass
class _Seen:
    """What is known of the unit that an actor runs."""

    unit: WorkUnit | Bundle
    read: int
    written: int
    changed: float
    """When a byte was last seen to move."""
    stalls: bool = False


class Meter:
    """Tells `progress` while units run, and `stall` once for each time that one stops moving."""

    def __init__(
        self,
        listener: Listener,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._listener = listener
        self._metrics = metrics
        self._clock = clock
        self._seen: dict[Actor, _Seen] = {}
        self._asked: dict[Any, Actor] = {}
        self._next = 0.0

    def begin(self, actor: Actor, unit: WorkUnit | Bundle) -> None:
        """An actor has been handed a unit."""
        self._seen[actor] = _Seen(unit, 0, 0, self._clock())

    def end(self, actor: Actor, moved: Moved) -> None:
        """An actor is done with its unit, and this is what it has moved in all."""
        self._take(actor, moved)
        del self._seen[actor]

    def lose(self, actor: Actor) -> None:
        """An actor is lost."""
        self._seen.pop(actor, None)

    def look(self) -> None:
        """Hear the answers that are there and ask again, if it is time."""
        now = self._clock()
        if now < self._next or not self._seen:
            return
        self._next = now + max(LOOK, SHARE * len(self._seen))
        for reference in _answered(self._asked):
            actor = self._asked.pop(reference)
            try:
                self._take(actor, ray.get(reference))
            except RayError:
                continue  # its unit's answer tells that it is lost
        for actor in self._seen.keys() - set(self._asked.values()):
            self._asked[actor.handle.moved.remote()] = actor
        for actor, seen in self._seen.items():
            if now - seen.changed >= STALL and not seen.stalls:
                seen.stalls = True
                self._metrics.add("stalls", 1, actor.node)
                where = {"shard": seen.unit.shard, "node": actor.node, "pid": actor.pid}
                self._listener(Event("stall", {**where, "seconds": round(now - seen.changed)}))

    def _take(self, actor: Actor, moved: Moved) -> None:
        index, read, written = moved
        seen = self._seen.get(actor)
        if seen is None or index != seen.unit.index:
            return  # of an earlier unit
        more = {"bytes_read": read - seen.read, "bytes_written": written - seen.written}
        if any(more.values()):
            seen.read, seen.written, seen.changed, seen.stalls = read, written, self._clock(), False
            where = {"shard": seen.unit.shard, "node": actor.node, "pid": actor.pid}
            self._listener(Event("progress", more | where))


def _answered(asked: Iterable[Any]) -> list[Any]:
    references = list(asked)
    if not references:
        return []
    ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
    return list(ready)
