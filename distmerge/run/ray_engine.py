"""Units on a Ray cluster: actors that pull one unit at a time.

No tensor passes through the driver or Ray's object store; units go out, receipts come back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from distmerge.expressions.evaluate import Place
from distmerge.expressions.model_questions import KeyPartials
from distmerge.plan.digest import kernel_class
from distmerge.plan.memory import bare_process, fitted
from distmerge.plan.work import Source, WorkUnit
from distmerge.run.events import Event, Listener, silent
from distmerge.run.worker import OnBytes, Worker, WorkerSettings
from distmerge.write.shard import Receipt

ATTEMPTS = 3
"""Times that a unit may lose its worker, or a worker fail to start, before the run gives up."""
PATIENCE = 30.0
"""Seconds without a worker after which the user is told."""
LOST = (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)


class RayWorker:
    """A `Worker` in an actor's process."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._worker: Worker

    def hello(self, sources: Sequence[Source]) -> str:
        """Start, and say what class of processor this is.

        Reads a byte of every source: raises if this machine doesn't see what the driver saw, and
        if what this process holds leaves too little of its allowance.
        """
        kernel = kernel_class(self._settings.device)
        memory = fitted(self._settings.memory, bare_process())
        self._worker = Worker(replace(self._settings, memory=memory))
        for source in sources:
            file = next(iter(source.files.values()))
            self._worker.open(source).read_into(file, 0, memoryview(bytearray(1)))
        return kernel

    def merge(self, unit: bytes, known: bytes) -> Receipt:
        """See `Worker.merge`."""
        return self._worker.merge(cloudpickle.loads(unit), cloudpickle.loads(known))

    def ask(self, unit: bytes, known: bytes) -> bytes:
        """See `Worker.ask`. The share goes back pickled: what Ray hands out itself is read-only,
        and partial answers are folded in place."""
        share = self._worker.ask(cloudpickle.loads(unit), cloudpickle.loads(known))
        return bytes(cloudpickle.dumps(share))


class RayEngine:
    """Hands each idle actor the next unit; a lost actor's unit goes to another one."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        workers: int,
        kernel: str,
        address: str | None = None,
        on_bytes: OnBytes | None = None,
        listener: Listener = silent,
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._kernel = kernel
        self._on_bytes = on_bytes or (lambda read, written: None)
        self._listener = listener
        self._started = not ray.is_initialized()
        if self._started:
            _start(address, workers)
        self._actors: list[Any] = []
        """Those that have said hello."""
        self._coming: dict[Any, Any] = {}
        """Those that have not yet: what they will say -> actor."""
        self._false_starts = 0

    def merge(self, units: Sequence[WorkUnit], known: Mapping[Place, Any]) -> Iterator[Receipt]:
        """Receipts as units finish, on whichever actor."""
        for _, receipt in self._map("merge", units, known):
            self._on_bytes(receipt.bytes_read, receipt.size)
            yield receipt

    def ask(
        self, units: Sequence[WorkUnit], known: Mapping[Place, Any]
    ) -> Iterator[list[KeyPartials]]:
        """Shares in the units' order: floats are folded in key order, whoever was first."""
        waiting: dict[int, list[KeyPartials]] = {}
        order = [unit.index for unit in units]
        for unit, share in self._map("ask", units, known):
            waiting[unit.index] = cloudpickle.loads(share)
            while order and order[0] in waiting:
                yield waiting.pop(order.pop(0))

    def _map(
        self, job: str, units: Sequence[WorkUnit], known: Mapping[Place, Any]
    ) -> Iterator[tuple[WorkUnit, Any]]:
        # Our own pickle: a user's functions, which workers can't import, travel by value in it.
        answers = ray.put(cloudpickle.dumps(dict(known)))
        todo = list(reversed(units))
        attempts: dict[int, int] = {}
        idle = list(self._actors)
        running: dict[Any, tuple[Any, WorkUnit]] = {}
        while todo or running:
            while todo and idle:
                actor, unit = idle.pop(), todo.pop()
                sent = cloudpickle.dumps(unit)
                running[getattr(actor, job).remote(sent, answers)] = (actor, unit)
            self._start_actors(min(self._workers, len(running) + len(todo)), units)
            finished = self._wait(running)
            if finished in self._coming:
                idle += self._welcome(finished)
                continue
            actor, unit = running.pop(finished)
            try:
                result = _get(finished)
            except LOST as error:
                self._actors.remove(actor)
                attempts[unit.index] = attempts.get(unit.index, 0) + 1
                self._note_loss(unit.shard, attempts[unit.index], error)
                todo.append(unit)
                continue
            idle.append(actor)
            yield unit, result

    def _wait(self, running: Mapping[Any, Any]) -> Any:
        """The first answer; says so when there is none for want of workers."""
        while True:
            finished, _ = ray.wait([*running, *self._coming], timeout=PATIENCE)
            if finished:
                return finished[0]
            if not running:
                text = f"Waiting for {len(self._coming)} workers: has Ray processors to spare?"
                self._listener(Event("notice", {"text": text}))

    def _start_actors(self, enough: int, units: Sequence[WorkUnit]) -> None:
        """See to it that so many actors are there or coming."""
        options = {"num_cpus": self._settings.threads, "max_restarts": 0, "max_task_retries": 0}
        if self._settings.device.startswith("cuda"):
            options["num_gpus"] = 1
        sources = list(_sources(units).values())
        while len(self._actors) + len(self._coming) < enough:
            actor: Any = ray.remote(RayWorker).options(**options).remote(self._settings)
            self._coming[actor.hello.remote(sources)] = actor

    def _welcome(self, hello: Any) -> list[Any]:
        """Take an actor in, unless its bits or its view of the inputs would differ; [] if it
        died on the way."""
        actor = self._coming.pop(hello)
        try:
            found = _get(hello)
        except LOST as error:
            self._false_starts += 1
            self._note_loss("a worker that started", self._false_starts, error)
            return []
        if found != self._kernel:
            raise RecipeError(
                "A worker's processor would give other bits than this machine's.",
                f"here   {self._kernel}",
                f"worker {found}",
                fix="export ATEN_CPU_CAPABILITY=avx2 (or default) here and on every node",
            )
        self._false_starts = 0
        self._actors.append(actor)
        return [actor]

    def _note_loss(self, what: str, attempt: int, error: RayError) -> None:
        """Raises WorkerLost if that happened once too often."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["it died"]
        if attempt >= ATTEMPTS:
            raise WorkerLost(
                f"{what} lost its worker {attempt} times.",
                *dict.fromkeys((lines[0], lines[-1])),
                f"a worker may use {self._settings.memory.allowed / 2**30:.1f} GiB, "
                f"planned {self._settings.memory.projected / 2**30:.1f} GiB",
                fix="look at Ray's logs of that node; a smaller --allowed-mem, or fewer --workers",
            )
        self._listener(Event("retry", {"shard": what, "attempt": attempt + 1, "reason": lines[0]}))

    def close(self) -> None:
        """End the actors, and Ray if this engine started it."""
        for actor in (*self._actors, *self._coming.values()):
            ray.kill(actor)
        if self._started:
            ray.shutdown()


def _get(reference: Any) -> Any:
    """An answer; what a worker raised as it was raised there."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None


def _start(address: str | None, workers: int) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address is None:  # "local": Ray would otherwise join whatever cluster it finds here
        options |= {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RecipeError(
            f"Could not join the Ray cluster at {address or 'this machine'}.",
            str(error).splitlines()[0],
            fix="check --address, or leave it out to start Ray here",
        ) from error


def _sources(units: Sequence[WorkUnit]) -> dict[tuple[str, str | None], Source]:
    return {(s.root, s.revision): s for unit in units for s in unit.sources.values() if s.files}
