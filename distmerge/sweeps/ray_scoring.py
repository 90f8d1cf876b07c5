"""The other half of `scoring.py`: candidates are evaluated in tasks on a Ray cluster's nodes.

What a task is sent is the candidate's plan, and the evaluator by value; scores come back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import cloudpickle
import ray

from distmerge.methods.user_code import travels_as_code
from distmerge.plan.sizes import parse_size
from distmerge.run.options import MergeOptions
from distmerge.run.ray_cluster import join
from distmerge.sweeps.scoring import Job, Scored, score, told


def score_on_cluster(jobs: Iterable[Job], at_once: int, settings: MergeOptions) -> Iterator[Scored]:
    """As they finish, so many at a time; a task whose process is lost is run again by Ray."""
    started = not ray.is_initialized()
    if started:
        join(settings.address, settings.processes)
    asked: dict[str, Any] = {"num_cpus": 1, "memory": parse_size(settings.allowed_mem)}
    if settings.device.startswith("cuda"):
        asked["num_gpus"] = 1
    task: Any = ray.remote(max_retries=2, **asked)(_score_there)
    left = iter(jobs)
    running: dict[Any, Job] = {}
    try:
        while True:
            for job in islice(left, at_once - len(running)):
                travels_as_code(job.evaluator.function)
                running[task.remote(cloudpickle.dumps(job))] = job
            if not running:
                return
            finished = ray.wait(list(running), num_returns=1)[0][0]
            job = running.pop(finished)
            try:
                yield cloudpickle.loads(ray.get(finished))
            except ray.exceptions.RayError as error:
                yield Scored(job.number, error=told(error))
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if started:
            ray.shutdown()


def _score_there(job: bytes) -> bytes:
    return bytes(cloudpickle.dumps(score(cloudpickle.loads(job))))
