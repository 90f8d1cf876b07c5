"""One pass over the inputs for several candidates: shards and receipts of all of them.

Publishing is left to each candidate's own merge, which finds the receipts; so is whatever this
pass could not do. What it can't do is therefore no error here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

from distmerge.checkpoints.store import OutputStore
from distmerge.errors import DistmergeError, MemoryBudgetError
from distmerge.expressions.evaluate import Place
from distmerge.expressions.model_questions import KeyPartials, ModelQuestions
from distmerge.plan.memory import MemoryPlan, bare_process, fitted
from distmerge.plan.plan import Plan
from distmerge.run.allocator import give_back_freed_memory
from distmerge.run.bundle import Bundle, Outcome
from distmerge.run.engine import Engine
from distmerge.run.events import Event, Listener, told_bytes
from distmerge.run.journal import load_answers, save_answers
from distmerge.run.member import Candidate
from distmerge.run.merge import check_place, make_way, open_engine
from distmerge.run.options import MergeOptions
from distmerge.write.lease import LeaseKeeper, lease
from distmerge.write.output import open_output
from distmerge.write.publish import look
from distmerge.write.shard import read_receipt


@dataclass(frozen=True)
class _Held:
    """A candidate whose output this run holds, and has something to write there."""

    plan: Plan
    output: OutputStore
    keeper: LeaseKeeper

    def told(self, known: Mapping[Place, Any]) -> Candidate:
        """What workers are told of it."""
        request = self.plan.request
        return Candidate(
            self.plan.digest, self.output.root, request.seed, known, request.storage_options
        )

    def missing(self) -> set[int]:
        """Numbers of the units whose shard isn't there, with its receipt."""
        files, digest = self.output.list(), self.plan.digest
        return {
            number
            for number, unit in enumerate(self.plan.units)
            if read_receipt(self.output, files, digest, unit.shard, unit.path) is None
        }


def fill(
    plans: Sequence[Plan],
    places: Sequence[str],
    memory: MemoryPlan,
    settings: MergeOptions,
    listener: Listener,
) -> None:
    """Write the shards that are missing at these places."""
    with ExitStack() as stack:
        held = []
        for plan, place in zip(plans, places, strict=True):
            with suppress(DistmergeError):  # the merge of its own, which follows, tells
                found = _begin(plan, place, settings, stack)
                held += [found] if found else []
        if len(held) > 1:
            with suppress(MemoryBudgetError):  # passes before this one may have left something
                memory = fitted(memory, bare_process())
            first = replace(held[0].plan, memory=memory)
            out = held[0].output.root
            engine = open_engine(first, settings, out, told_bytes(listener), listener)
            stack.callback(engine.close)
            try:
                _run(held, engine, listener)
            except DistmergeError as error:  # what all of them read: each is tried alone
                text = f"One by one from here, since {error.headline}"
                listener(Event("notice", {"text": text}))
    give_back_freed_memory()


def _begin(plan: Plan, place: str, settings: MergeOptions, stack: ExitStack) -> _Held | None:
    """Take hold of an output; None if nothing is to be done there."""
    output = open_output(place, plan.request.storage_options)
    output.begin(plan.digest)
    published = look(output)
    if published.holds(plan.digest):
        return None
    check_place(plan, output, published, settings)
    keeper = stack.enter_context(lease(output))
    published = look(output)  # again: now nobody else writes
    if published.holds(plan.digest):
        return None
    make_way(plan, output, published, settings)
    stack.callback(_clear, output, keeper)
    return _Held(plan, output, keeper)


def _clear(output: OutputStore, keeper: LeaseKeeper) -> None:
    with suppress(DistmergeError):
        keeper.check()
        output.remove_temporaries()


def _run(held: Sequence[_Held], engine: Engine, listener: Listener) -> None:
    """Answer what is asked about whole models, then merge, unit by unit."""
    left = {one.plan.digest: one for one in held}
    known = _answers(left, engine, listener) if held[0].plan.asks_model else {}
    missing = {digest: one.missing() for digest, one in left.items()}
    total = sum(len(one.plan.units) for one in held)
    done = total - sum(map(len, missing.values()))

    def bundles() -> Iterator[Bundle]:
        for number in range(len(held[0].plan.units)):
            todo = [one for digest, one in left.items() if number in missing[digest]]
            if todo:
                yield _bundle(todo, number, known)

    for outcome in engine.merge_together(bundles()):
        _drop(left, outcome, listener)
        for one in list(left.values()):
            with suppress(DistmergeError):
                one.keeper.check()
                continue
            del left[one.plan.digest]
        for receipt in outcome.receipts.values():
            done += 1
            listener(Event("unit", {"shard": receipt.shard, "done": done, "total": total}))


def _bundle(todo: Sequence[_Held], number: int, known: Mapping[str, Mapping[Place, Any]]) -> Bundle:
    told = tuple(one.told(known.get(one.plan.digest, {})) for one in todo)
    return Bundle(told, tuple(one.plan.units[number] for one in todo))


def _drop(left: dict[str, _Held], outcome: Outcome, listener: Listener) -> None:
    """Leave out who failed; its merge of its own, which follows, tells whether it ends so."""
    for digest, error in outcome.failed.items():
        one = left.pop(digest, None)
        if one is not None:
            text = f"{one.output.root} is tried alone, since {error.headline}"
            listener(Event("notice", {"text": text}))


def _answers(
    left: dict[str, _Held], engine: Engine, listener: Listener
) -> dict[str, Mapping[Place, Any]]:
    """Each plan's answers about the whole model, found together, and kept beside its receipts.
    Who fails is left out."""
    questions = {
        digest: ModelQuestions(load_answers(one.output, digest)) for digest, one in left.items()
    }
    asking = [digest for digest, about in questions.items() if not about.known]
    while asking:
        known = {digest: questions[digest].known for digest in asking}
        held = [left[digest] for digest in asking]
        numbers = range(len(held[0].plan.units))
        shares: dict[str, list[KeyPartials]] = {digest: [] for digest in asking}
        for outcome in engine.ask_together(_bundle(held, n, known) for n in numbers):
            _drop(left, outcome, listener)
            for digest, keys in outcome.partials.items():
                shares[digest] += keys
        for digest in asking:
            if digest in left and not questions[digest].fold(shares[digest]):
                save_answers(left[digest].output, digest, questions[digest].known)
        asking = [d for d in asking if d in left and shares[d]]
    return {digest: about.known for digest, about in questions.items()}
