"""Units of several plans run side by side: each window of their inputs is read once, and every
member merges it with its own program into its own shard.

A member that fails is dropped, and the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from distmerge.checkpoints.store import OutputStore
from distmerge.errors import DistmergeError
from distmerge.expressions.compute_pool import one_torch_thread
from distmerge.expressions.evaluate import Evaluation
from distmerge.plan.bundle import side_by_side
from distmerge.plan.memory import WINDOW, WINDOWS
from distmerge.plan.plan import Plan
from distmerge.plan.work import KeyTask, WorkUnit
from distmerge.run.fetch import Fetched
from distmerge.run.unit import UnitContext, UnitRun
from distmerge.run.windows import Streamed, Window, is_copied
from distmerge.run.worker import Worker, write_receipt
from distmerge.write.shard import Receipt, ShardWriter


class Member:
    """One plan's part in a pass."""

    def __init__(self, plan: Plan, output: OutputStore) -> None:
        self.plan = plan
        self.output = output
        self.error: DistmergeError | None = None
        self._windows = [torch.empty(WINDOW, dtype=torch.uint8) for _ in range(WINDOWS)]

    def writer(self, unit: WorkUnit) -> ShardWriter:
        """Into the unit's file; one at a time."""
        return ShardWriter(self.output.open_write(unit.path), unit.header, self._windows)

    def receive(self, run: UnitRun, writer: ShardWriter, bytes_read: int) -> Receipt:
        """Make the shard visible, with its receipt."""
        checksum = writer.commit()
        return write_receipt(
            self.output, self.plan.digest, run, writer.size, checksum, bytes_read=bytes_read
        )


class BundleRun(UnitRun):
    """Runs the units of equal layout of several members. It reads as a unit does; what it makes of
    a window is left to the members."""

    def __init__(
        self, members: Sequence[Member], units: Sequence[WorkUnit], context: UnitContext
    ) -> None:
        together, own = side_by_side(units)
        super().__init__(together, context, None)
        # Else the windows would hold only what asks about the whole model.
        self._only_ask = False
        self.members = members
        self.writers = [m.writer(unit) for m, unit in zip(members, own, strict=True)]
        self.runs = [
            UnitRun(
                unit,
                replace(context, seed=m.plan.request.seed, gathered=m.plan.memory.gathered),
                writer,
            )
            for m, unit, writer in zip(members, own, self.writers, strict=True)
        ]
        self._streaming: Streamed | None = None
        self._streamed: list[Streamed] = []
        self._left: set[int] = set()
        """Members that have written the key that is streamed."""

    def evaluation(self, task: KeyTask) -> Evaluation:
        return self.runs[0].evaluation(self.runs[0].unit.tasks[self.unit.tasks.index(task)])

    def process(self, window: Window, fetched: Fetched) -> None:
        shared = window.streamed
        if shared is not None and shared is not self._streaming:
            self._streaming, self._left = shared, set()
            self._streamed = [self._begin(run, window.tasks[0]) for run in self.runs]
        if shared is not None and window.blocks[0] == 0:
            self._left = {i for i, s in enumerate(self._streamed) if s.last_round}
        for i, (member, run) in enumerate(zip(self.members, self.runs, strict=True)):
            if member.error is None and not (shared is not None and i in self._left):
                own = window if shared is None else replace(window, streamed=self._streamed[i])
                try:
                    run.process(own, fetched)
                except DistmergeError as error:
                    member.error = error
        if all(member.error is not None for member in self.members):
            raise next(m.error for m in self.members if m.error is not None)
        if shared is not None and window.blocks[0] == 0:
            shared.last_round = all(
                streamed.last_round or member.error is not None
                for member, streamed in zip(self.members, self._streamed, strict=True)
            )

    def _begin(self, run: UnitRun, place: int) -> Streamed:
        task = run.unit.tasks[place]
        return Streamed(None if is_copied(task) else run.evaluation(task))

    def finish(self) -> list[Receipt]:
        """Make the shards of the members that did not fail visible."""
        receipts = []
        for member, run, writer in zip(self.members, self.runs, self.writers, strict=True):
            if member.error is not None:
                continue
            try:
                receipts.append(member.receive(run, writer, self.bytes_read))
            except DistmergeError as error:
                member.error = error
        return receipts

    def discard(self) -> None:
        """Leave nothing of what is not finished."""
        for member, writer in zip(self.members, self.writers, strict=True):
            if member.error is not None:
                writer.discard()


def run_side_by_side(
    worker: Worker, members: Sequence[Member], units: Sequence[WorkUnit]
) -> list[Receipt]:
    """One shard of each member; members that fail hold their error."""
    run = BundleRun(members, units, worker.unit_context({}))
    try:
        with one_torch_thread():
            run.run()
        receipts = run.finish()
    except BaseException:
        for writer in run.writers:
            writer.discard()
        raise
    run.discard()
    return receipts
