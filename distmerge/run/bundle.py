"""Units of several plans run side by side: each window of their inputs is read once, what their
programs have in common is computed once, and every member writes its own shard.

A member that fails is dropped, and the others go on.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from distmerge.errors import DistmergeError
from distmerge.expressions.compute_pool import one_torch_thread
from distmerge.expressions.model_questions import KeyPartials
from distmerge.plan.work import Source, WorkUnit
from distmerge.run.bundle_run import BundleRun
from distmerge.run.member import Candidate, Member
from distmerge.run.worker import Worker
from distmerge.write.shard import Receipt


@dataclass(frozen=True)
class Bundle:
    """What is sent to a worker: the units of equal layout of several plans."""

    candidates: tuple[Candidate, ...]
    units: tuple[WorkUnit, ...]

    @property
    def index(self) -> int:
        """Of the unit in its plan."""
        return self.units[0].index

    @property
    def shard(self) -> str:
        """Of the unit in its plan."""
        return self.units[0].shard

    @property
    def sources(self) -> dict[Any, Source]:
        """Whatever is read for any of them."""
        return {
            (number, *origin): source
            for number, unit in enumerate(self.units)
            for origin, source in unit.sources.items()
        }


@dataclass
class Outcome:
    """What came of a bundle, by digest of the plan."""

    receipts: dict[str, Receipt] = field(default_factory=dict)
    failed: dict[str, DistmergeError] = field(default_factory=dict)
    partials: dict[str, list[KeyPartials]] = field(default_factory=dict)
    """What the keys of a unit have to say to open questions about the whole model."""


def merge_bundle(worker: Worker, bundle: Bundle) -> Outcome:
    """One shard of each candidate.

    Raises what reading raises: then none of them has any.
    """
    members = [Member(one, worker.windows(n)) for n, one in enumerate(bundle.candidates)]
    with ExitStack() as undo:
        pairs = zip(members, bundle.units, strict=True)
        opened = [pair for pair in pairs if _opened(*pair, undo)]
        receipts: dict[str, Receipt] = {}
        if opened:
            writing, units = zip(*opened, strict=True)
            run = BundleRun(writing, units, worker.unit_context({}))
            with one_torch_thread():
                run.run()
            receipts = run.finish()
    return Outcome(receipts, {m.told.digest: m.error for m in members if m.error is not None})


def _opened(member: Member, unit: WorkUnit, undo: ExitStack) -> bool:
    """Can it write? What it then leaves unfinished is discarded by `undo`."""
    undo.callback(member.discard)
    try:
        member.open(unit)
    except DistmergeError as error:
        member.error = error
    return member.error is None


def ask_bundle(worker: Worker, bundle: Bundle) -> Outcome:
    """What each candidate's keys have to say to open questions about the whole model."""
    members = [Member(one, ()) for one in bundle.candidates]
    run = BundleRun(members, bundle.units, worker.unit_context({}))
    with one_torch_thread():
        run.run()
    shares = {m.told.digest: own.model_partials for m, own in zip(members, run.runs, strict=True)}
    failed = {m.told.digest: m.error for m in members if m.error is not None}
    return Outcome(failed=failed, partials=shares)
