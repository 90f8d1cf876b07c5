"""Running a sweep's evaluator on its candidates, several at a time, in this process.

A candidate whose evaluator raises, or returns no finite number, gets an error instead of scores,
and the others go on. On a cluster `ray_scoring.py` does the same on its nodes.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from distmerge.plan.plan import Plan
from distmerge.plan.sizes import parse_size
from distmerge.run.options import MergeOptions
from distmerge.sweeps.candidates import least_merging, materialised, merging_bytes
from distmerge.sweeps.distances import comparing_bytes
from distmerge.sweeps.evaluation import Evaluate, Evaluator, load_evaluator
from distmerge.sweeps.results import checked_scores

ShouldStop = Callable[[int, int, float], bool]
"""Told a job's number, how many scores it has yielded before this one, and the score."""


def never(number: int, step: int, value: float) -> bool:
    """Stops nothing."""
    return False


@dataclass(frozen=True)
class Scoring:
    """How a sweep's candidates will be scored."""

    evaluator: Evaluator
    at_once: int
    """Candidates."""
    merging: int
    """Bytes that merging one into memory may use, in each process."""
    comparing: bool
    """Are candidates compared with their parents?"""

    def __str__(self) -> str:
        together = f", {self.at_once} at once" if self.at_once > 1 else ""
        alone = "" if self.comparing else ", not compared with its parents"
        return f"{self.evaluator.name}, given a {self.evaluator.given}{together}{alone}"

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        evaluator = self.evaluator
        return {"function": evaluator.name, "given": evaluator.given, "at_once": self.at_once}


def plan_scoring(
    wanted: Evaluate,
    plans: Sequence[Plan],
    settings: MergeOptions,
    evaluator: Evaluator | None = None,
) -> Scoring:
    """Load the evaluator, and see that candidates fit into memory.

    Raises
        RecipeError, UnknownMethod: the evaluator can't be used.
        MemoryBudgetError: fewer bytes are allowed than the candidates take.
    """
    evaluator = evaluator or load_evaluator(wanted)
    here = settings.engine == "local"
    at_once = evaluated_at_once(wanted, settings)
    allowed = parse_size(settings.allowed_mem)
    each = at_once if here else 1  # on a cluster every candidate has a process
    comparing = wanted.distances
    beside = max(map(comparing_bytes, plans))
    if evaluator.given == "state_dict":  # each group is a merge of its own
        asks = any(plan.asks_model for plan in plans)
        comparing = comparing and not asks and allowed - beside >= least_merging(plans)
    beside = beside if comparing else 0
    merging = merging_bytes(plans, evaluator.given, each, allowed, beside)
    return Scoring(evaluator, at_once, merging, comparing)


def evaluated_at_once(wanted: Evaluate, settings: MergeOptions) -> int:
    """Candidates: one, or on a cluster one a worker, unless it is said."""
    return wanted.at_once or (1 if settings.engine == "local" else settings.processes)


@dataclass(frozen=True)
class Job:
    """One candidate to be scored, as it can be sent to another process."""

    number: int
    plan: Plan
    evaluator: Evaluator
    merging: int
    """Bytes that merging it into memory may use."""
    comparing: bool = False
    """Is it compared with its parents?"""


@dataclass(frozen=True)
class Scored:
    """What came of a job."""

    number: int
    scores: dict[str, float] = field(default_factory=dict)
    distances: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    stopped: bool = False
    """Was it ended on the way, since others were better there?"""
    seconds: float = 0.0


def score(job: Job, should_stop: ShouldStop = never) -> Scored:
    """Evaluate one candidate. Never raises for what the candidate or the evaluator do wrong.

    should_stop: asked with each score that the evaluator yields on the way.
    """
    began = time.monotonic()
    made = Scored(job.number)
    try:
        given = job.evaluator.given
        with materialised(job.plan, given, job.merging, comparing=job.comparing) as (
            candidate,
            far,
        ):
            returned, stopped = _last(job, job.evaluator.function(candidate), should_stop)
            made = Scored(job.number, {} if stopped else checked_scores(returned), far)
            made = replace(made, stopped=stopped)
    except (Exception, SystemExit) as raised:
        made = Scored(job.number, error=told(raised))
    return replace(made, seconds=round(time.monotonic() - began, 3))


def told(error: BaseException) -> str:
    """An exception in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _last(job: Job, returned: Any, should_stop: ShouldStop) -> tuple[Any, bool]:
    """What an evaluator returns, or the last that it yields; and whether it was stopped."""
    if not inspect.isgenerator(returned):
        return returned, False
    last, step = None, 0
    try:
        while True:
            last = next(returned)
            if should_stop(job.number, step, next(iter(checked_scores(last).values()))):
                returned.close()
                return last, True
            step += 1
    except StopIteration as end:
        return last if end.value is None else end.value, False


def score_here(
    jobs: Iterable[Job], at_once: int, should_stop: ShouldStop = never
) -> Iterator[Scored]:
    """In this process's threads, as they finish; a job is taken when there is room for it. Stopped,
    it waits for those that run."""
    left = iter(jobs)
    running: set[Future[Scored]] = set()
    with ThreadPoolExecutor(at_once, "distmerge-evaluate") as pool:
        while True:
            for job in islice(left, at_once - len(running)):
                running.add(pool.submit(score, job, should_stop))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
