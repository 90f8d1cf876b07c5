"""The other half of `scoring.py`: candidates are evaluated in tasks on a Ray cluster's nodes.

What a task is sent is the candidate's plan, and the evaluator by value; scores come back. Whether
one is stopped on the way is asked of this process, through an actor at which both sides wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import cloudpickle
import ray

from distmerge.methods.user_code import travels_as_code
from distmerge.plan.sizes import parse_size
from distmerge.run.options import MergeOptions
from distmerge.run.ray_cluster import join
from distmerge.sweeps.scoring import Job, Scored, ShouldStop, never, score, told


def score_on_cluster(
    jobs: Iterable[Job], at_once: int, settings: MergeOptions, should_stop: ShouldStop = never
) -> Iterator[Scored]:
    """As they finish, so many at a time; a task whose process is lost is run again by Ray."""
    started = join(settings.address, settings.processes)
    asked: dict[str, Any] = {"num_cpus": 1, "memory": parse_size(settings.allowed_mem)}
    if settings.device.startswith("cuda"):
        asked["num_gpus"] = 1
    task: Any = ray.remote(max_retries=2, **asked)(_score_there)
    left = iter(jobs)
    running: dict[Any, Job] = {}
    desk = None if should_stop is never else _Desk.remote()
    question = desk.next.remote() if desk else None
    try:
        while True:
            for job in islice(left, at_once - len(running)):
                travels_as_code(job.evaluator.function)
                running[task.remote(cloudpickle.dumps(job), desk)] = job
            if not running:
                return
            waiting = [*running, question] if question is not None else list(running)
            finished = ray.wait(waiting, num_returns=1)[0][0]
            if desk is not None and finished == question:
                number, step, value = ray.get(question)
                desk.answer.remote(number, should_stop(number, step, value))
                question = desk.next.remote()
                continue
            job = running.pop(finished)
            try:
                yield cloudpickle.loads(ray.get(finished))
            except ray.exceptions.RayError as error:
                yield Scored(job.number, error=told(error))
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if desk is not None:
            ray.kill(desk)
        if started:
            ray.shutdown()


def _score_there(job: bytes, desk: Any) -> bytes:
    def should_stop(number: int, step: int, value: float) -> bool:
        return bool(ray.get(desk.ask.remote(number, step, value)))

    return bytes(
        cloudpickle.dumps(score(cloudpickle.loads(job), never if desk is None else should_stop))
    )


class _Questions:
    """Candidates ask here whether they are to be stopped, and wait for the answer."""

    def __init__(self) -> None:
        self._asked: asyncio.Queue[tuple[int, int, float]] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[bool]] = {}

    async def ask(self, number: int, step: int, value: float) -> bool:
        """By a candidate; one question at a time."""
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._asked.put((number, step, value))
        return await self._answers[number]

    async def next(self) -> tuple[int, int, float]:
        """The next question."""
        return await self._asked.get()

    async def answer(self, number: int, stops: bool) -> None:
        """To a candidate's question."""
        self._answers[number].set_result(stops)


_Desk: Any = ray.remote(num_cpus=0)(_Questions)
