"""Running a sweep: candidates are scored, if they are to be, and those that are kept written.

Each goes to OUT/NAME, and one that fails doesn't stop the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from distmerge.checkpoints.location import HUB_SCHEME
from distmerge.checkpoints.store import OutputStore
from distmerge.errors import RecipeError
from distmerge.expressions.recipe_text import Given
from distmerge.run.events import Event, Listener, silent
from distmerge.run.options import MergeOptions
from distmerge.sweeps.definition import Candidate, Sweep, load_sweep
from distmerge.sweeps.evaluation import ALL, Evaluator, Keep
from distmerge.sweeps.plan import SweepPlan, narrowed, plan_sweep
from distmerge.sweeps.report import as_html
from distmerge.sweeps.results import (
    REPORT,
    TABLE,
    Result,
    Results,
    as_csv,
    ranked,
    score_names,
)
from distmerge.sweeps.scoring import Job, Scored, Scoring, ShouldStop, never, score_here
from distmerge.sweeps.scratch import ANYWHERE, Scratch, Spool, spooling
from distmerge.sweeps.write_kept import Told, write_kept
from distmerge.write.lease import LeaseKeeper, lease
from distmerge.write.output import open_output, output_name


def sweep(
    definition: Given,
    out: str,
    *,
    evaluate: Any = None,
    keep: str | None = None,
    scratch: str | None = None,
    scratch_size: int | str | None = None,
    listener: Listener = silent,
    **options: Any,
) -> list[Result]:
    """Merge many variants of one recipe, score them, write those that are kept.

    Parameters
        definition: a recipe with `grid`, `zip`, `list`, `sample`, `combinations` or `exclude`
            beside its keys: path, YAML text or dict.
        out: directory or URL; a candidate is written to `out/name`, results to `out`.
        evaluate, keep: instead of the definition's; here the evaluator may be a function, too.
        scratch, scratch_size: the folder where inputs that come over a network are kept while they
            are needed, and the most bytes there: `out`, if it is local, and what is free. `none`
            keeps nothing.
        listener: told what happens, see `distmerge.run.events`.
        options: the fields of `MergeOptions`.

    Returns
        A result for each candidate, in the order of the space: its settings, scores, and where it
        was written. Repeated, only what is missing is done.

    Raises
        SweepFailed: some candidates failed; the others are done, and `out/results.jsonl` has all.
        DistmergeError: what can be known from headers, before anything is read.
    """
    settings = MergeOptions.of("sweep", options, listener=listener, scratch=scratch)
    wanted = load_sweep(
        definition,
        overrides=settings.overrides,
        strict=settings.strict,
        storage_options=settings.storage_options,
        judging={k: v for k, v in (("evaluate", evaluate), ("keep", keep)) if v is not None},
    )
    where = Scratch(scratch, scratch_size)
    return run_sweep(wanted, output_name(out), settings, scratch=where, listener=listener)


def run_sweep(
    sweep: Sweep,
    out: str,
    settings: MergeOptions,
    *,
    scratch: Scratch = ANYWHERE,
    listener: Listener = silent,
    told: Told = lambda results, by: None,
) -> list[Result]:
    """Score and write a sweep's candidates below `out`; repeated, it does what is missing.

    scratch: where inputs may be kept that come over a network.
    told: given the results before failures among them are raised.

    Returns the result of each candidate, in their order.

    Raises
        SweepFailed: some failed; the others are done.
        DistmergeError: as `plan_sweep`, before anything is written.
    """
    decided = plan_sweep(sweep, settings, out=out, scratch=scratch, listener=listener)
    return run_planned(decided, out, settings, listener=listener, told=told)


def run_planned(
    decided: SweepPlan,
    out: str,
    settings: MergeOptions,
    *,
    listener: Listener = silent,
    told: Told = lambda results, by: None,
) -> list[Result]:
    """As `run_sweep`, of what has been planned for that place under these options."""
    plain = replace(settings, overrides=(), strict=False)
    spool = decided.spool if isinstance(decided.spool, Spool) else None
    if decided.scoring is None:
        results = [_fresh(candidate) for candidate in decided.candidates]
        numbers = range(len(results))
        with spooling(spool, settings, listener):
            return write_kept(decided, numbers, results, out, plain, listener, told, ALL)
    if out.startswith(HUB_SCHEME):
        raise RecipeError(
            "A sweep that is evaluated can't go to the Hub.",
            fix="write to a directory, and upload the best with 'distmerge merge'",
        )
    output = open_output(out, decided.plans[0].request.storage_options)
    with lease(output) as held, spooling(spool, settings, listener):
        results = _score(decided, decided.scoring, output, held, settings, listener)
        winners = kept(decided.keep, results)
        chosen = narrowed(decided, winners, settings)
        try:
            return write_kept(chosen, winners, results, out, plain, listener, told, decided.keep)
        finally:
            held.check()
            write_tables(output, results, decided.keep)


def write_tables(output: OutputStore, results: Sequence[Result], keep: Keep) -> None:
    """The results for spreadsheets, and for people if there are scores."""
    output.write_bytes(TABLE, as_csv(results).encode())
    if any(result.scores for result in results):
        output.write_bytes(REPORT, as_html(results, keep).encode())


def kept(keep: Keep, results: Sequence[Result]) -> list[int]:
    """The numbers of the candidates that are written, the best first.

    Raises
        RecipeError: none has the score that they are chosen by.
    """
    scored = [i for i, result in enumerate(results) if result.error is None]
    if keep.metric is None:
        return scored[: keep.count]
    best = ranked(results, keep.metric, lowest=keep.lowest)[: keep.count]
    if scored and not best:
        names = score_names(results)
        raise RecipeError(
            f"keep: {keep}, and no candidate has a score {keep.metric!r}.",
            f"the evaluator returned {', '.join(names)}",
            fix=f"keep: best {keep.count} by {next(iter(names), 'score')}",
        )
    return [results.index(result) for result in best]


def _score(
    decided: SweepPlan,
    scoring: Scoring,
    output: OutputStore,
    held: LeaseKeeper,
    settings: MergeOptions,
    listener: Listener,
) -> list[Result]:
    """A result for each candidate; those that have scores already are left as they are."""
    known, evaluator = Results(output), scoring.evaluator
    found: dict[int, Result] = {}
    jobs, doubt = [], False
    for i, (candidate, plan) in enumerate(zip(decided.candidates, decided.plans, strict=True)):
        earlier = known.find(candidate.name, plan.digest, evaluator.digest)
        if earlier is not None:
            found[i] = replace(earlier, settings=candidate.settings, place=None)
        else:
            jobs.append(Job(i, plan, evaluator, scoring.merging, scoring.comparing))
    if found:
        text = f"{len(found)} of {len(decided.candidates)} candidates have their scores already"
        listener(Event("notice", {"text": text}))
    for scored in scored_by(jobs, scoring.at_once, settings):
        candidate, plan = decided.candidates[scored.number], decided.plans[scored.number]
        result = result_of(candidate, scored, plan.digest, evaluator)
        held.check()
        known.add(result)
        found[scored.number] = result
        output.write_bytes(TABLE, as_csv([found[i] for i in sorted(found)]).encode())
        listener(Event("score", {**score_summary(result), "done": len(found)}))
        doubt = doubt or _tell_doubt(decided.keep, result, listener)
    return [found[i] for i in range(len(decided.candidates))]


def _tell_doubt(keep: Keep, result: Result, listener: Listener) -> bool:
    """Say at the first candidate, not only at the last, that `keep` goes by a score it lacks.

    No error, as other candidates may have it.
    """
    if keep.metric is None or result.error is not None or keep.metric in result.scores:
        return False
    has = ", ".join(result.scores) or "none"
    text = f"{result.name} has no score {keep.metric!r}, which keep: {keep} goes by; it has {has}"
    listener(Event("notice", {"text": text}))
    return True


def scored_by(
    jobs: Iterable[Job], at_once: int, settings: MergeOptions, should_stop: ShouldStop = never
) -> Iterator[Scored]:
    """Jobs as they finish, wherever the engine's workers are."""
    if settings.engine == "local":
        return score_here(jobs, at_once, should_stop)
    from distmerge.sweeps.ray_scoring import score_on_cluster

    return score_on_cluster(jobs, at_once, settings, should_stop)


def result_of(candidate: Candidate, scored: Scored, digest: str, evaluator: Evaluator) -> Result:
    """What is kept of an evaluation. digest: of the candidate's plan."""
    return Result(
        candidate.name,
        candidate.settings,
        scored.scores,
        distances=scored.distances,
        error=scored.error,
        seconds=scored.seconds,
        digest=digest,
        evaluator=evaluator.digest,
    )


def score_summary(result: Result) -> dict[str, Any]:
    """What an event tells of it."""
    return {
        "candidate": result.name,
        "scores": dict(result.scores),
        "error": result.error,
        "seconds": result.seconds,
    }


def _fresh(candidate: Candidate) -> Result:
    return Result(candidate.name, candidate.settings)
