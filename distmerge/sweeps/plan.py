"""What a sweep would do, from recipes and headers: its candidates' plans, its passes, its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distmerge.checkpoints.location import Location
from distmerge.checkpoints.tensors import Checkpoint
from distmerge.errors import DistmergeError, MemoryBudgetError, RecipeError
from distmerge.expressions.problems import SHOWN
from distmerge.expressions.recipe_build import Settled, request_of, settle
from distmerge.expressions.recipe_opening import pin_models
from distmerge.plan.bundle import passes
from distmerge.plan.memory import MemoryPlan
from distmerge.plan.plan import Plan
from distmerge.plan.sizes import format_size, parse_size
from distmerge.run.events import Listener, silent, tell_notices
from distmerge.run.merge import as_request, plan_request
from distmerge.run.options import MergeOptions
from distmerge.sweeps.definition import Candidate, Sweep, of_candidate
from distmerge.sweeps.evaluation import ALL, Keep
from distmerge.sweeps.inputs import bytes_once
from distmerge.sweeps.scoring import Scoring, plan_scoring
from distmerge.sweeps.scratch import (
    ANYWHERE,
    Scratch,
    Spool,
    place_for,
    plan_spool,
    through_spool,
)
from distmerge.write.output import open_output

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class SweepPlan:
    """Everything that is decided before the first tensor is read."""

    candidates: tuple[Candidate, ...]
    plans: tuple[Plan, ...]
    """One for each candidate."""
    passes: tuple[tuple[int, ...], ...]
    """Candidates that are merged together, each byte of their inputs being read once."""
    memories: tuple[MemoryPlan, ...]
    """A worker's, in each pass."""
    keep: Keep = ALL
    """Which candidates are written."""
    scoring: Scoring | None = None
    """How they are scored first; without it there are no scores."""
    spool: Spool | str | None = None
    """Where inputs are kept for later reads; a sentence if remote ones are read again."""

    @cached_property
    def bytes_in(self) -> int:
        """Bytes that all passes read, from where the models are."""
        if isinstance(self.spool, Spool):
            return bytes_once(self.plans)
        return sum(bytes_once(self.plans[i] for i in members) for members in self.passes)

    @property
    def bytes_in_apart(self) -> int:
        """Bytes that as many single merges would read."""
        return sum(plan.bytes_in for plan in self.plans)

    @property
    def bytes_out(self) -> int:
        """Bytes of the candidates that are written; the most that they can be."""
        sizes = sorted((plan.nbytes for plan in self.plans), reverse=True)
        return sum(sizes[: self.keep.count])

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Every model that some candidate reads, once."""
        found = {one.url: one for plan in self.plans for one in plan.checkpoints}
        return list(found.values())

    @property
    def projected(self) -> int:
        """Bytes of a worker in the pass that needs most."""
        return max(memory.projected for memory in self.memories)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        names = [candidate.name for candidate in self.candidates]
        return {
            "candidates": [
                {
                    "name": candidate.name,
                    "settings": candidate.settings,
                    "expression": plan.expression,
                    "digest": plan.digest,
                    "bytes_in": plan.bytes_in,
                    "bytes_out": plan.nbytes,
                    "warnings": list(plan.request.warnings),
                }
                for candidate, plan in zip(self.candidates, self.plans, strict=True)
            ],
            "passes": [[names[i] for i in members] for members in self.passes],
            "bytes_in": self.bytes_in,
            "bytes_in_apart": self.bytes_in_apart,
            "bytes_out": self.bytes_out,
            "spool": self.spool.to_json() if isinstance(self.spool, Spool) else None,
            "evaluate": None if self.scoring is None else self.scoring.to_json(),
            "keep": str(self.keep),
            "projected_mem": self.projected,
            "allowed_mem": self.plans[0].memory.allowed,
        }

    def tables(self) -> list[Table]:
        """For people: the candidates, and what they cost together."""
        from distmerge.plan.describe import listed

        rows = [
            (candidate.name, plan.expression, format_size(plan.nbytes))
            for candidate, plan in zip(self.candidates, self.plans, strict=True)
        ]
        read, apart = format_size(self.bytes_in), format_size(self.bytes_in_apart)
        memory = format_size(self.projected), format_size(self.plans[0].memory.allowed)
        cost = [
            ("candidates", str(len(self.candidates))),
            ("passes over the inputs", str(len(self.passes))),
            ("read", f"{read} (merged one by one: {apart})"),
            *self._spooling(),
            *self._judging(),
            ("written", format_size(self.bytes_out)),
            ("memory a worker", " of ".join(memory)),
        ]
        return [
            listed("Candidates", ("candidate", "merge", "written"), rows),
            listed("Sweep", ("what", "it is"), cost),
        ]

    def _spooling(self) -> list[tuple[str, str]]:
        if isinstance(self.spool, Spool):
            return [("read once, kept meanwhile", str(self.spool))]
        return [("inputs are read again", self.spool)] if self.spool else []

    def _judging(self) -> list[tuple[str, str]]:
        if self.scoring is None:
            return []
        return [("evaluated", str(self.scoring)), ("kept", str(self.keep))]


def plan_sweep(
    sweep: Sweep,
    settings: MergeOptions,
    *,
    out: str | None = None,
    scratch: Scratch = ANYWHERE,
    place: str | None = None,
    pinned: dict[Location, Checkpoint] | None = None,
    listener: Listener = silent,
) -> SweepPlan:
    """Open the models, each once, and plan all candidates. Nothing is read but headers.

    out: where the candidates are to be written, if that is known: its store takes memory.
    scratch: where inputs that are read more than once may be kept.
    place: of a spool that there is already.
    pinned: models that are open already; those that are opened here are added.
    listener: told the candidates' warnings.

    Raises
        DistmergeError: a model can't be used; a candidate can't be merged, or needs more memory.
    """
    given = settings.storage_options
    options = sweep.candidates[0].recipe.storage_options if given is None else given
    settled = [_named(candidate) for candidate in sweep.candidates]
    pinned = {} if pinned is None else pinned
    named = [ref for one in settled for ref in one.named if ref.location not in pinned]
    near = {at: name for one in settled for at, name in one.near_names().items()}
    place = place or place_for(scratch, out)
    for location, checkpoint in pin_models(named, options, near).items():
        pinned[location] = through_spool(checkpoint, place)
    sending = open_output(out or ".", options).buffers  # a local one, where none is named
    # The recipes hold the overrides already.
    plain = replace(settings, overrides=(), strict=False)
    plans: list[Plan] = []
    failed: list[tuple[str, DistmergeError]] = []
    for candidate, one in zip(sweep.candidates, settled, strict=True):
        try:
            request = as_request(request_of(one, pinned, options), plain)
            request = replace(request, strict=settings.strict)
            plans.append(plan_request(request, plain, sending=sending))
        except DistmergeError as error:
            failed.append((candidate.name, error))
    if failed:
        raise _unplanned(failed, len(settled))
    warnings = dict.fromkeys(text for plan in plans for text in plan.request.warnings)
    tell_notices(warnings, listener)
    together = _passes(plans, settings)
    members = tuple(run for run, _ in together)
    memories = tuple(memory for _, memory in together)
    judging, scoring = sweep.judging, None
    if judging.evaluate is not None:
        scoring = plan_scoring(judging.evaluate, plans, settings)
    decided = SweepPlan(sweep.candidates, tuple(plans), members, memories, judging.kept, scoring)
    if scoring is None and len(members) == 1:
        return decided
    comparing = scoring is not None and scoring.comparing
    written = decided.bytes_out
    spool = plan_spool(plans, scratch, place, comparing=comparing, written=written, out=out)
    return replace(decided, spool=spool)


def narrowed(decided: SweepPlan, numbers: Sequence[int], settings: MergeOptions) -> SweepPlan:
    """The plan of these candidates alone."""
    plans = [decided.plans[i] for i in numbers]
    together = _passes(plans, settings) if plans else ()
    return SweepPlan(
        tuple(decided.candidates[i] for i in numbers),
        tuple(plans),
        tuple(run for run, _ in together),
        tuple(memory for _, memory in together),
    )


def _passes(
    plans: Sequence[Plan], settings: MergeOptions
) -> Sequence[tuple[tuple[int, ...], MemoryPlan]]:
    return passes(plans, allowed=parse_size(settings.allowed_mem), threads=settings.threads)


def _named(candidate: Candidate) -> Settled:
    """The candidate's recipe with the roles of its models."""
    try:
        return settle(candidate.recipe)
    except DistmergeError as error:
        raise of_candidate(error, candidate.name) from None


def _unplanned(failed: list[tuple[str, DistmergeError]], total: int) -> DistmergeError:
    first, error = failed[0]
    if len(failed) == 1 or isinstance(error, MemoryBudgetError):
        return of_candidate(error, first)
    facts = [f"{name}: {error.headline}" for name, error in failed[:SHOWN]]
    more = [f"and {len(failed) - SHOWN} more"] if len(failed) > SHOWN else []
    return RecipeError(
        f"{len(failed)} of {total} candidates can't be merged.",
        *facts,
        *more,
        *error.facts,
        fix=error.fix or "take them out with a rule under 'exclude:'",
    )
