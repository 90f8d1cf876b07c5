"""One pass over the inputs for several candidates: shards and receipts of all of them.

Publishing is left to each candidate's own merge, which finds the receipts; so is whatever this
pass could not do. What it can't do is therefore no error here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress

from distmerge.checkpoints.store import OutputStore
from distmerge.errors import DistmergeError
from distmerge.plan.memory import MemoryPlan
from distmerge.plan.plan import Plan
from distmerge.run.allocator import give_back_freed_memory
from distmerge.run.bundle import Member, run_side_by_side
from distmerge.run.events import Event, Listener, told_bytes
from distmerge.run.merge import check_place, make_way
from distmerge.run.options import MergeOptions
from distmerge.run.worker import Worker, WorkerSettings
from distmerge.write.lease import LeaseKeeper, lease
from distmerge.write.output import open_output
from distmerge.write.publish import look
from distmerge.write.shard import read_receipt


def fill(
    plans: Sequence[Plan],
    places: Sequence[str],
    memory: MemoryPlan,
    settings: MergeOptions,
    listener: Listener,
) -> None:
    """Write the shards that are missing at these places."""
    held: list[tuple[Member, LeaseKeeper]] = []
    with ExitStack() as stack:
        for plan, place in zip(plans, places, strict=True):
            with suppress(DistmergeError):  # the merge of its own, which follows, tells
                found = _begin(plan, place, settings, stack)
                held += [found] if found else []
        if len(held) > 1:
            _run([m for m, _ in held], [k for _, k in held], memory, settings, stack, listener)
    held.clear()  # with the members' windows, which the next pass has anew
    give_back_freed_memory()


def _begin(
    plan: Plan, place: str, settings: MergeOptions, stack: ExitStack
) -> tuple[Member, LeaseKeeper] | None:
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
    return Member(plan, output), keeper


def _clear(output: OutputStore, keeper: LeaseKeeper) -> None:
    with suppress(DistmergeError):
        keeper.check()
        output.remove_temporaries()


def _run(
    members: Sequence[Member],
    keepers: Sequence[LeaseKeeper],
    memory: MemoryPlan,
    settings: MergeOptions,
    stack: ExitStack,
    listener: Listener,
) -> None:
    first = members[0]
    worker_settings = WorkerSettings(
        output=first.output.root,
        digest=first.plan.digest,
        memory=memory,
        threads=settings.threads,
        seed=first.plan.request.seed,
        device=settings.device,
        allow_non_finite=settings.allow_non_finite,
        storage_options=first.plan.request.storage_options,
    )
    worker = Worker(worker_settings, told_bytes(listener))
    stack.callback(worker.close)
    total = sum(len(member.plan.units) for member in members)
    done = 0
    for number in range(len(first.plan.units)):
        for member, keeper in zip(members, keepers, strict=True):
            try:
                keeper.check()
            except DistmergeError as error:
                member.error = error
        todo = [m for m in members if m.error is None and not _has(m, number)]
        done += len(members) - len(todo)
        if not todo:
            continue
        try:
            receipts = run_side_by_side(worker, todo, [m.plan.units[number] for m in todo])
        except DistmergeError as error:  # what all of them read: each is tried alone
            listener(Event("notice", {"text": f"One by one from here, since {error.headline}"}))
            return
        for receipt in receipts:
            done += 1
            data = {"shard": receipt.shard, "done": done, "total": total}
            listener(Event("unit", data))


def _has(member: Member, number: int) -> bool:
    """Is a shard there, with its receipt?"""
    unit, digest = member.plan.units[number], member.plan.digest
    files = member.output.list()
    return read_receipt(member.output, files, digest, unit.shard, unit.path) is not None
