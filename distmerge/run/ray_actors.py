"""The Ray engine's workers: those that are there, those that are coming, those that were lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from distmerge.errors import RecipeError, WorkerLost
from distmerge.plan.work import Source
from distmerge.run.events import Event, Listener
from distmerge.run.ray_cluster import asked_for
from distmerge.run.ray_metrics import Metrics
from distmerge.run.ray_worker import Greeting, RayWorker, versions
from distmerge.run.worker import WorkerSettings

ATTEMPTS = 3
"""Times that a unit may lose its worker, or workers in a row fail to start, before the run gives
up."""
QUEUED = 64
"""Workers that wait for a place at a time: enough for any cluster that grows to begin with."""
LOST = (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)


_STARTING = "a worker that started"
_REMOTE: Any = ray.remote  # its types know no groups
_WORKER = _REMOTE(concurrency_groups={"watch": 1})(RayWorker)


@dataclass(eq=False)
class Actor:
    """A worker that has said hello."""

    handle: Any
    node: str
    pid: int


class Roster:
    """All actors of one engine."""

    def __init__(self, settings: WorkerSettings, kernel: str, listener: Listener) -> None:
        self.live: list[Actor] = []
        self.coming: dict[Any, Any] = {}
        """What they will say -> those that have not said hello yet."""
        self.asked = asked_for(settings)
        self.metrics = Metrics()
        self._settings = settings
        self._kernel = kernel
        self._listener = listener
        self._false_starts: list[str] = []

    def call_up(self, enough: int, sources: Sequence[Source]) -> None:
        """See to it that so many actors are there or coming, spread over the nodes, and no more
        are coming than that.

        Those for which there is no room wait in Ray's queue, which is what makes a cluster grow
        that can; on a node that joins they start."""
        told = cloudpickle.dumps(self._settings), cloudpickle.dumps(list(sources))
        while self.coming and len(self.live) + len(self.coming) > enough:
            _, surplus = self.coming.popitem()
            ray.kill(surplus)
        while len(self.live) + len(self.coming) < enough and len(self.coming) < QUEUED:
            made: Any = _WORKER.options(
                num_cpus=self.asked["CPU"],
                num_gpus=self.asked.get("GPU", 0),
                memory=int(self.asked["memory"]),
                scheduling_strategy="SPREAD",
                max_restarts=0,  # Ray would run the unit again on the same node
                max_task_retries=0,
            )
            handle = made.remote()
            self.coming[handle.hello.remote(versions(), *told)] = handle

    def welcome(self, hello: Any) -> list[Actor]:
        """Take an actor in; [] if it died on the way.

        Raises
            RecipeError: its bits, or what it understands of a unit, would differ.
            WorkerLost: as many in a row as a unit may lose died on the way.
        """
        handle = self.coming.pop(hello)
        try:
            said: Greeting = answer(hello)
        except LOST as error:
            self._false_starts.append("on its way")
            self.note_loss(_STARTING, self._false_starts, error)
            return []
        _check(said, self._kernel)
        self._false_starts.clear()
        actor = Actor(handle, said["node"], said["pid"])
        self.live.append(actor)
        self._listener(Event("worker", {"node": actor.node, "pid": actor.pid}))
        return [actor]

    def lose(self, actor: Actor) -> None:
        """Strike an actor off; if only the way to it is broken, it ends too."""
        self.live.remove(actor)
        ray.kill(actor.handle)

    def note_loss(self, what: str, places: Sequence[str], error: RayError) -> None:
        """Tell that something lost its worker at these places so far.

        Raises
            WorkerLost: that happened once too often.
        """
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["it died"]
        if len(places) >= ATTEMPTS:
            starts = what == _STARTING
            memory = self._settings.memory
            lost = f"{what} lost its worker {len(places)} times.", f"on {', '.join(places)}"
            raise WorkerLost(
                *((f"{len(places)} workers in a row died as they started.",) if starts else lost),
                *dict.fromkeys((lines[0], lines[-1])),
                f"a worker may use {memory.allowed / 2**30:.1f} GiB, "
                f"planned {memory.projected / 2**30:.1f} GiB",
                fix="look at Ray's logs of that node; a smaller --allowed-mem, or fewer --workers",
            ) from error
        told = {"shard": what, "attempt": len(places) + 1, "node": places[-1], "reason": lines[0]}
        self._listener(Event("retry", told))
        self.metrics.add("reruns", 1, places[-1])

    def close(self) -> None:
        """End them all."""
        for handle in (*(actor.handle for actor in self.live), *self.coming.values()):
            ray.kill(handle)


def answer(reference: Any) -> Any:
    """What an actor answers; what it raised as it was raised there."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None


def _check(said: Greeting, kernel: str) -> None:
    here = versions()
    if said["versions"] != here:
        names = [name for name in here if said["versions"].get(name) != here[name]]
        raise RecipeError(
            "A worker has other versions than this machine.",
            *(
                f"{name} {here[name]} here, {said['versions'].get(name)} on {said['node']}"
                for name in names
            ),
            fix="install the same distmerge, torch and Python on every node",
        )
    if said["kernel"] != kernel:
        raise RecipeError(
            "A worker's processor would give other bits than this machine's.",
            f"here   {kernel}",
            f"worker {said['kernel']}, on {said['node']}",
            fix="export ATEN_CPU_CAPABILITY=avx2 (or default) here and on every node",
        )
