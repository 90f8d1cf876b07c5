"""Searching a sweep's space instead of walking through it: Optuna proposes, the evaluator scores.

A trial is a candidate; its result is kept like a sweep's, and its score told to the study, in this
order: a run that is stopped between the two finds the result, and evaluates nothing twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distmerge.checkpoints.location import Location
from distmerge.checkpoints.store import OutputStore
from distmerge.checkpoints.tensors import Checkpoint
from distmerge.errors import DistmergeError, RecipeError
from distmerge.expressions.recipe_text import Document, Given, override
from distmerge.run.events import Event, Listener, silent
from distmerge.run.options import MergeOptions
from distmerge.sweeps.definition import Candidate, Sweep, candidate_recipe, read_sweep
from distmerge.sweeps.evaluation import (
    Evaluate,
    Evaluator,
    Judging,
    Keep,
    is_better_low,
    load_evaluator,
)
from distmerge.sweeps.names import names_of
from distmerge.sweeps.plan import SweepPlan, plan_sweep
from distmerge.sweeps.results import Result, Results
from distmerge.sweeps.run import kept, result_of, score_summary, scored_by, write_tables
from distmerge.sweeps.scoring import Job, Scored, evaluated_at_once, plan_scoring
from distmerge.sweeps.scratch import NOWHERE, Scratch, open_spool, spooling
from distmerge.sweeps.space import Space
from distmerge.sweeps.trials import Trials
from distmerge.sweeps.write_kept import Told, write_kept
from distmerge.write.lease import LeaseKeeper, lease
from distmerge.write.local_output import LocalOutput
from distmerge.write.output import open_output, output_name

STUDY = "study.db"


@dataclass
class _Search:
    """What all trials share."""

    space: Space
    documents: list[Document]
    wanted: Evaluate
    evaluator: Evaluator
    by: Keep
    settings: MergeOptions
    results: Results
    listener: Listener
    held: LeaseKeeper
    """The output's: it is looked at before each result is kept."""
    place: str | None
    """Of the spool."""
    pinned: dict[Location, Checkpoint] = field(default_factory=dict)
    """Models that have been opened, for all candidates."""
    told: set[str] = field(default_factory=set)
    """Warnings of candidates, each of which is told once."""
    digests: dict[int, tuple[Candidate, str]] = field(default_factory=dict)

    def candidate(self, name: str, found: Mapping[str, Any]) -> Candidate:
        """Raises DistmergeError: these settings make no recipe."""
        options = self.settings.storage_options
        settings = dict(found)
        recipe = candidate_recipe(name, settings, self.space, self.documents, options)
        return Candidate(name, settings, recipe)

    def job(self, number: int, name: str, found: Mapping[str, Any]) -> Job:
        """A trial that is to be scored. Raises DistmergeError: it can't be merged."""
        candidate = self.candidate(name, found)
        plan = self._planned(Sweep((candidate,))).plans[0]
        scoring = plan_scoring(self.wanted, [plan], self.settings, self.evaluator)
        self.digests[number] = (candidate, plan.digest)
        return Job(number, plan, self.evaluator, scoring.merging, scoring.comparing)

    def tried(self, study: Trials) -> list[Result]:
        """What came of the study's trials. Raises RecipeError: nothing that has a score."""
        results = [found for name in study.candidates if (found := self.results.named(name))]
        if not any(result.scores for result in results):
            raise RecipeError(
                f"None of {study.done} trials gave a score.",
                *dict.fromkeys(str(result.error) for result in results[:3]),
                fix="look at the evaluator, and at the rules under exclude",
            )
        return results

    def plan_of(self, results: Sequence[Result], out: str) -> SweepPlan:
        """The plan of candidates that are to be written."""
        candidates = tuple(self.candidate(one.name, one.settings) for one in results)
        return self._planned(Sweep(candidates), out)

    def _planned(self, sweep: Sweep, out: str | None = None) -> SweepPlan:
        return plan_sweep(
            sweep,
            self.settings,
            out=out,
            scratch=Scratch(NOWHERE),  # but for what there is
            place=self.place,
            pinned=self.pinned,
            listener=self._tell_once,
        )

    def _tell_once(self, event: Event) -> None:
        """Candidates share most of their warnings."""
        if event.data["text"] not in self.told:
            self.told.add(event.data["text"])
            self.listener(event)


def search(
    definition: Given,
    out: str,
    *,
    trials: int = 50,
    sampler: str = "tpe",
    pruner: str = "none",
    storage: str | None = None,
    scratch: str | None = None,
    scratch_size: int | str | None = None,
    evaluate: Any = None,
    keep: str | None = None,
    listener: Listener = silent,
    told: Told = lambda results, by: None,
    **options: Any,
) -> list[Result]:
    """Search a sweep's space for good scores, and write the candidates that are kept.

    Parameters
        definition: as for `distmerge.sweep`; `count` and `how` of a sample have no meaning here.
        trials: in all, those of earlier runs included.
        sampler: tpe, cmaes, random or qmc.
        pruner: none, median, halving or hyperband: stops evaluators that yield scores on the way.
        storage: of the study, as Optuna takes it; a database in `out` by default.
        scratch, scratch_size: as for `distmerge.sweep`.
        options: the fields of `MergeOptions`; `seed` is also the sampler's.

    Returns
        A result for each candidate that was tried.

    Raises
        RecipeError: the space, the evaluator or the storage can't be used; no trial gave a score.
        DistmergeError: as `distmerge.sweep`.
    """
    own = {"trials": trials, "sampler": sampler, "pruner": pruner, "storage": storage}
    told_to = {"scratch": scratch, "listener": listener, "told": told}
    settings, out = MergeOptions.of("search", options, **own, **told_to), output_name(out)
    judging = {k: v for k, v in (("evaluate", evaluate), ("keep", keep)) if v is not None}
    space, judged, documents = _definition(definition, judging, settings)
    assert judged.evaluate is not None
    evaluator, by = load_evaluator(judged.evaluate), _ranking(judged)
    output = open_output(out, settings.storage_options)
    spool = open_spool(Scratch(scratch, scratch_size), out)
    with lease(output) as held, spooling(spool, settings, listener):
        study = Trials(
            space,
            name=_study_name(documents, evaluator, str(by.metric)),
            storage=storage or _storage_in(output, out),
            sampler=sampler,
            pruner=pruner,
            seed=settings.seed or 0,
            lowest=by.lowest,
        )
        plain, kept_at = replace(settings, overrides=()), Results(output)
        asked = (space, documents, judged.evaluate, evaluator, by)
        run = _Search(*asked, plain, kept_at, listener, held, spool.place if spool else None)
        _try(run, study, trials)
        return _write(run, judged.kept, run.tried(study), output, out, told)


def _write(
    run: _Search, keep: Keep, results: list[Result], output: OutputStore, out: str, told: Told
) -> list[Result]:
    """What `write_kept` does, with what is to be kept; and the tables."""
    try:
        winners = kept(keep, results)
        chosen = run.plan_of([results[i] for i in winners], out) if winners else None
        return write_kept(chosen, winners, results, out, run.settings, run.listener, told, run.by)
    finally:
        run.held.check()
        write_tables(output, results, run.by)


def _definition(
    definition: Given, judging: Mapping[str, Any], settings: MergeOptions
) -> tuple[Space, Judging, list[Document]]:
    """What is searched, by what, in which recipe. Raises RecipeError."""
    space, judged, documents = read_sweep(definition, judging)
    space.check_parts()
    if judged.evaluate is None:
        raise RecipeError("A search goes by scores.", fix="evaluate: judging.py:score")
    return space, judged, override(documents, settings.overrides)


def _ranking(judged: Judging) -> Keep:
    """The score that the study goes by, and whether low ones are good."""
    if judged.kept.metric is not None:
        return judged.kept
    metric = "perplexity" if judged.evaluate and judged.evaluate.perplexity else "score"
    return Keep(count=0, metric=metric, lowest=is_better_low(metric))


def _try(run: _Search, study: Trials, trials: int) -> None:
    """Evaluate until the study has so many trials."""
    at_once = evaluated_at_once(run.wanted, run.settings)
    for scored in scored_by(_jobs(run, study, trials), at_once, run.settings, study.should_stop):
        candidate, digest = run.digests.pop(scored.number)
        _note(run, study, candidate, digest, scored)


def _jobs(run: _Search, study: Trials, trials: int) -> Iterator[Job]:
    """Trials to be evaluated, as there is room for them; those that need not be are told here."""
    for _ in range(trials - study.done):
        asked = study.ask()
        if asked is None:
            continue
        number, found = asked
        name = f"{number:03d},{names_of([found])[0]}"
        try:
            job = run.job(number, name, found)
        except DistmergeError as error:
            if number == 0:
                raise  # most likely all of them
            run.held.check()
            run.results.add(Result(name, found, error=error.headline))
            study.tell_failed(number, name, error.headline)
            continue
        known = run.results.holding(job.plan.digest, run.evaluator.digest)
        if known is not None and run.by.metric in known.scores:
            run.digests.pop(number)
            study.tell(number, known.name, known.scores[str(run.by.metric)])
            continue
        yield job


def _note(run: _Search, study: Trials, candidate: Candidate, digest: str, scored: Scored) -> None:
    """Keep a result, then tell the study."""
    number, metric = scored.number, str(run.by.metric)
    run.held.check()
    if scored.stopped:
        study.tell_stopped(number)
        run.listener(Event("notice", {"text": f"{candidate.name} was stopped on the way"}))
        return
    if scored.error is None and metric not in scored.scores:
        names = ", ".join(scored.scores)
        error = f"there is no score {metric!r} to go by among {names}: keep: best 1 by NAME"
        scored = replace(scored, scores={}, error=error)
    result = result_of(candidate, scored, digest, run.evaluator)
    run.results.add(result)
    if result.error is None:
        study.tell(number, candidate.name, result.scores[metric])
    else:
        study.tell_failed(number, candidate.name, result.error)
    run.listener(Event("score", {**score_summary(result), "done": study.done}))


def _study_name(documents: Sequence[Document], evaluator: Evaluator, metric: str) -> str:
    """Scores of another recipe or evaluator are another study."""
    told = repr([sorted(map(repr, document.data.items())) for document in documents])
    text = f"{told} {evaluator.digest} {metric}"
    return f"distmerge-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def _storage_in(output: OutputStore, out: str) -> str:
    if not isinstance(output, LocalOutput):
        raise RecipeError(
            f"A search to {out} needs a place for its study.", fix="--storage sqlite:///study.db"
        )
    return f"sqlite:///{output.root}/{STUDY}"
