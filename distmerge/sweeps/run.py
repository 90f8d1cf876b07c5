"""Running a sweep: each candidate goes to OUT/NAME, and one that fails doesn't stop the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from distmerge.errors import DistmergeError, SweepFailed
from distmerge.expressions.problems import SHOWN
from distmerge.run.events import Event, Listener, silent
from distmerge.run.merge import merge
from distmerge.run.options import MergeOptions
from distmerge.sweeps.definition import Candidate, Sweep
from distmerge.sweeps.plan import plan_sweep
from distmerge.sweeps.together import fill


def run_sweep(
    sweep: Sweep, out: str, settings: MergeOptions, *, listener: Listener = silent
) -> dict[str, str]:
    """Merge every candidate and publish it below `out`; repeated, it does what is missing.

    Returns the place of each candidate, by name.

    Raises
        SweepFailed: some could not be merged; the others are written.
        DistmergeError: as `plan_sweep`, before anything is written.
    """
    decided = plan_sweep(sweep, settings, out=out)
    places = {candidate.name: place_of(out, candidate) for candidate in decided.candidates}
    failed: dict[str, DistmergeError] = {}
    plain = replace(settings, overrides=(), strict=False)
    options = vars(plain)
    for number, members in enumerate(decided.passes):
        if len(members) > 1:
            text = f"pass {number + 1} of {len(decided.passes)}, {len(members)} candidates"
            listener(Event("notice", {"text": text}))
            plans = [decided.plans[i] for i in members]
            to = [places[decided.candidates[i].name] for i in members]
            fill(plans, to, decided.memories[number], plain, listener)
        for i in members:
            name = decided.candidates[i].name
            listener(Event("notice", {"text": f"candidate {name}"}))
            try:
                merge(decided.plans[i], places[name], listener=listener, **options)
            except DistmergeError as error:
                failed[name] = error
                listener(Event("notice", {"text": f"{name} failed: {error.headline}"}))
    if failed:
        raise sweep_failed(failed, decided.candidates)
    return places


def place_of(out: str, candidate: Candidate) -> str:
    """Where a candidate is written."""
    return f"{out.rstrip('/')}/{candidate.name}"


def sweep_failed(
    failed: Mapping[str, DistmergeError], candidates: Sequence[Candidate]
) -> SweepFailed:
    """What is raised once all others are written."""
    facts = [f"{name}: {error.headline}" for name, error in list(failed.items())[:SHOWN]]
    facts += [f"and {len(failed) - SHOWN} more"] if len(failed) > SHOWN else []
    error = next(iter(failed.values()))
    return SweepFailed(
        f"{len(failed)} of {len(candidates)} candidates failed; the others are written.",
        *facts,
        *error.facts,
        fix=error.fix or "the same command tries them again",
    )
