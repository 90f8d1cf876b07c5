"""Units on a Ray cluster: actors, spread over its nodes, that pull one unit at a time.

A fast node so gets more of them. A worker that dies had one unit, so that one alone is blamed; it
runs again on another node where there is one.

No tensor passes through the driver or Ray's object store; units go out, receipts come back.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import cloudpickle
import ray

from distmerge.errors import RecipeError
from distmerge.expressions.evaluate import Place
from distmerge.expressions.model_questions import KeyPartials
from distmerge.plan.work import Source, WorkUnit
from distmerge.run.bundle import Bundle, Outcome
from distmerge.run.events import Event, Listener, silent
from distmerge.run.ray_actors import LOST, Actor, Roster, answer
from distmerge.run.ray_cluster import described, fits_somewhere, join
from distmerge.run.ray_meter import LOOK, Meter
from distmerge.run.worker import WorkerSettings
from distmerge.write.shard import Receipt

PATIENCE = 30.0
"""Seconds without a worker after which the user is told."""


class RayEngine:
    """Hands each idle actor the next unit; a lost actor's unit goes to another one."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        workers: int,
        kernel: str,
        address: str | None = None,
        as_needed: bool = False,
        listener: Listener = silent,
    ) -> None:
        """as_needed: on a cluster that isn't started here, as many workers as there are units for,
        whoever finds room; those that don't wait for nodes that come."""
        self._listener = listener
        self._started = join(address, workers)
        here = self._started and address is None
        self._workers = None if as_needed and not here else workers
        self._roster = Roster(settings, kernel, listener)
        if here and not fits_somewhere(self._roster.asked):
            self.close()
            raise RecipeError(
                "This machine has no room for a worker.",
                f"a worker needs {described(self._roster.asked)}",
                fix="a smaller --allowed-mem, or --engine local",
            )

    def merge(self, units: Sequence[WorkUnit], known: Mapping[Place, Any]) -> Iterator[Receipt]:
        """Receipts as units finish, on whichever actor."""
        for _, receipt in self._map("merge", units, known):
            yield receipt

    def ask(
        self, units: Sequence[WorkUnit], known: Mapping[Place, Any]
    ) -> Iterator[list[KeyPartials]]:
        """Shares in the units' order: floats are folded in key order, whoever was first."""
        return self._in_order("ask", units, known)

    def merge_together(self, bundles: Iterable[Bundle]) -> Iterator[Outcome]:
        """What came of bundles as they finish, on whichever actor."""
        for _, outcome in self._map("merge_together", list(bundles), {}):
            yield cloudpickle.loads(outcome)

    def ask_together(self, bundles: Iterable[Bundle]) -> Iterator[Outcome]:
        """In the bundles' order."""
        return self._in_order("ask_together", list(bundles), {})

    def _in_order(
        self, job: str, units: Sequence[WorkUnit | Bundle], known: Mapping[Place, Any]
    ) -> Iterator[Any]:
        waiting: dict[int, Any] = {}
        order = [unit.index for unit in units]
        for unit, share in self._map(job, units, known):
            waiting[unit.index] = cloudpickle.loads(share)
            while order and order[0] in waiting:
                yield waiting.pop(order.pop(0))

    def _map(
        self, job: str, units: Sequence[WorkUnit | Bundle], known: Mapping[Place, Any]
    ) -> Iterator[tuple[Any, Any]]:
        """Units as they finish, and what came of them."""
        # Our own pickle: a user's functions, which workers can't import, travel by value in it.
        answers = ray.put(cloudpickle.dumps(dict(known)))
        sources = list(_sources(units).values())
        todo = list(units)
        losses: dict[int, list[str]] = {}
        idle = list(self._roster.live)
        running: dict[Any, tuple[Actor, WorkUnit | Bundle]] = {}
        meter = Meter(self._listener, self._roster.metrics)
        while todo or running:
            while pair := pairing(todo, idle, self._roster.live, losses):
                actor, unit = pair
                idle.remove(actor)
                todo.remove(unit)
                sent = cloudpickle.dumps(unit)
                running[getattr(actor.handle, job).remote(sent, answers)] = pair
                meter.begin(actor, unit)
            left = len(running) + len(todo)
            self._roster.call_up(min(self._workers or left, left), sources)
            finished = self._wait(running, meter)
            if finished in self._roster.coming:
                idle += self._roster.welcome(finished)
                continue
            actor, unit = running.pop(finished)
            try:
                result, moved = answer(finished)
            except LOST as error:
                meter.lose(actor)
                self._roster.lose(actor)
                losses.setdefault(unit.index, []).append(actor.node)
                self._roster.note_loss(unit.shard, losses[unit.index], error)
                todo.insert(0, unit)  # what always kills its worker is to be known early
                continue
            meter.end(actor, moved)
            idle.append(actor)
            yield unit, result

    def _wait(self, running: Mapping[Any, Any], meter: Meter) -> Any:
        """The first answer; says so when there is none for want of workers."""
        since = time.monotonic()
        while True:
            meter.look()
            finished, _ = ray.wait([*running, *self._roster.coming], timeout=LOOK)
            if finished:
                return finished[0]
            if not running and time.monotonic() - since >= PATIENCE:
                since = time.monotonic()
                need = described(self._roster.asked)
                room = "" if fits_somewhere(self._roster.asked) else "; no node is that large"
                text = f"Waiting for {len(self._roster.coming)} workers of {need} each{room}."
                self._listener(Event("notice", {"text": text}))

    def close(self) -> None:
        """End the actors, and Ray if this engine started it."""
        self._roster.close()
        if self._started:
            ray.shutdown()


def pairing(
    todo: Sequence[WorkUnit | Bundle],
    idle: Sequence[Actor],
    live: Sequence[Actor],
    losses: Mapping[int, Sequence[str]],
) -> tuple[Actor, WorkUnit | Bundle] | None:
    """Who shall run which unit next, if anyone: in the units' order, but not on a node where the
    unit lost a worker as long as there is a worker elsewhere."""
    for unit in todo:
        bad = losses.get(unit.index, ())
        elsewhere = [actor for actor in live if actor.node not in bad]
        fit = [actor for actor in idle if actor in elsewhere or not elsewhere]
        if fit:
            return fit[0], unit
    return None


def _sources(units: Sequence[WorkUnit | Bundle]) -> dict[tuple[str, str | None], Source]:
    return {(s.root, s.revision): s for unit in units for s in unit.sources.values() if s.files}
