"""Writing the candidates of a sweep that are kept; those of one pass read their inputs once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from distmerge.errors import DistmergeError, RecipeError, SweepFailed
from distmerge.expressions.problems import SHOWN
from distmerge.run.events import Event, Listener
from distmerge.run.merge import merge
from distmerge.run.options import MergeOptions
from distmerge.sweeps.definition import Candidate
from distmerge.sweeps.evaluation import Keep
from distmerge.sweeps.plan import SweepPlan
from distmerge.sweeps.results import Result
from distmerge.sweeps.together import fill

Told = Callable[[Sequence[Result], Keep], None]
"""Shows results, ranked as the second says."""


def write_kept(
    decided: SweepPlan | None,
    numbers: Sequence[int],
    results: list[Result],
    out: str,
    settings: MergeOptions,
    listener: Listener,
    told: Told,
    by: Keep,
) -> list[Result]:
    """Write these candidates, in `results` under these numbers, and say where they are.

    Raises
        SweepFailed: some, of all candidates, failed.
    """
    failed = _write(decided, out, settings, listener) if decided else {}
    for number, candidate in zip(numbers, decided.candidates if decided else (), strict=True):
        error = failed.get(candidate.name)
        results[number] = replace(
            results[number],
            place=place_of(out, candidate) if error is None else None,
            error=None if error is None else error.headline,
        )
    told(results, by)
    unscored = {r.name: RecipeError(r.error) for r in results if r.error and r.name not in failed}
    if failed or unscored:
        raise sweep_failed({**unscored, **failed}, len(results))
    return results


def _write(
    decided: SweepPlan, out: str, settings: MergeOptions, listener: Listener
) -> dict[str, DistmergeError]:
    """Merge and publish every candidate of the plan; the errors of those that failed."""
    places = {candidate.name: place_of(out, candidate) for candidate in decided.candidates}
    failed: dict[str, DistmergeError] = {}
    options = vars(settings)
    for number, members in enumerate(decided.passes):
        if len(members) > 1:
            text = f"pass {number + 1} of {len(decided.passes)}, {len(members)} candidates"
            listener(Event("notice", {"text": text}))
            plans = [decided.plans[i] for i in members]
            to = [places[decided.candidates[i].name] for i in members]
            fill(plans, to, decided.memories[number], settings, listener)
        for i in members:
            name = decided.candidates[i].name
            listener(Event("notice", {"text": f"candidate {name}"}))
            try:
                merge(decided.plans[i], places[name], listener=listener, **options)
            except DistmergeError as error:
                failed[name] = error
                listener(Event("notice", {"text": f"{name} failed: {error.headline}"}))
    return failed


def place_of(out: str, candidate: Candidate) -> str:
    """Where a candidate is written."""
    return f"{out.rstrip('/')}/{candidate.name}"


def sweep_failed(failed: Mapping[str, DistmergeError], total: int) -> SweepFailed:
    """What is raised once all others, if there are any, are done."""
    facts = [f"{name}: {error.headline}" for name, error in list(failed.items())[:SHOWN]]
    facts += [f"and {len(failed) - SHOWN} more"] if len(failed) > SHOWN else []
    error = next(iter(failed.values()))
    how_many = f"{len(failed)} of {total} candidates failed; the others are done."
    return SweepFailed(
        how_many if len(failed) < total else f"Every candidate failed, {total} of {total}.",
        *facts,
        *error.facts,
        fix=error.fix or "the same command tries them again",
    )
