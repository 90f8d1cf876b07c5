"""One pass over a unit's inputs for several plans: read as one unit is, settled and streamed as
one, and every member handed its results block by block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from distmerge.errors import DistmergeError
from distmerge.expressions.rounds import ReadBlock
from distmerge.expressions.side_by_side import SideBySide
from distmerge.plan.bundle import side_by_side
from distmerge.plan.work import KeyTask, WorkUnit
from distmerge.run.fetch import Fetched
from distmerge.run.member import Member
from distmerge.run.results import Item
from distmerge.run.unit import UnitRun
from distmerge.run.unit_context import UnitContext
from distmerge.run.windows import Window
from distmerge.write.shard import Receipt

Take = Callable[[int, Tensor], None]
"""Given a member's number and its result."""
Made = list[Tensor | None] | Callable[[Take, int | None], None]
"""The results of one block, by member; or what makes and hands them over, one's alone if it is
given a number."""
Produce = Callable[[int, int], Made]


class BundleRun(UnitRun):
    """Runs the units of equal layout of several members: it reads as one unit does, settles and
    streams their programs as one, and hands each member its results."""

    def __init__(
        self,
        members: Sequence[Member],
        units: Sequence[WorkUnit],
        context: UnitContext,
    ) -> None:
        """Members that have opened no writer only ask."""
        together, own = side_by_side(units)
        super().__init__(together, context, None)
        self.members = members
        self.writers = [member.writer for member in members if member.writer is not None]
        self._only_ask = not self.writers
        self.runs = [
            UnitRun(
                unit,
                replace(
                    context,
                    seed=m.told.seed,
                    model_answers=m.told.known,
                    remembered=context.remembered // len(members),
                ),
                m.writer,
            )
            for m, unit in zip(members, own, strict=True)
        ]
        self._places = {id(task): i for i, task in enumerate(self.unit.tasks)}

    @property
    def _side_by_side(self) -> Sequence[Sequence[KeyTask]]:
        return [run.unit.tasks for run in self.runs]

    def is_out(self, number: int) -> bool:
        """Has that member failed?"""
        return self.members[number].error is not None

    def fail(self, number: int, error: DistmergeError) -> None:
        """Go on without that member."""
        self.members[number].error = error

    def guarded(self, number: int, call: Callable[..., Any], *given: Any) -> Any:
        """Call, unless the member has failed; it is out if this fails."""
        if self.is_out(number):
            return None
        try:
            return call(*given)
        except DistmergeError as error:
            self.fail(number, error)
            return None

    def evaluation(self, task: KeyTask) -> SideBySide:
        i = self._places[id(task)]
        own = [run.evaluation(run.unit.tasks[i]) for run in self.runs]
        return SideBySide(own, self.is_out, self.fail)

    def process(self, window: Window, fetched: Fetched) -> None:
        super().process(window, fetched)
        errors = [member.error for member in self.members if member.error is not None]
        if len(errors) == len(self.members):
            raise errors[0]

    def _check_finite(self) -> None:
        for number, run in enumerate(self.runs):
            self.guarded(number, run._check_finite)

    def _note(self, evaluation: SideBySide) -> None:
        for run, member in zip(self.runs, evaluation.members, strict=True):
            run._note(member)

    def _produce(self, i: int, block: int, evaluation: SideBySide | None, read: ReadBlock) -> Made:
        def make(take: Take, only: int | None) -> None:
            def one(number: int) -> None:
                if only not in (None, number):
                    return
                own = None if evaluation is None else evaluation.members[number]
                take(number, self.runs[number]._produce(i, block, own, read))

            if evaluation is not None:
                evaluation.each(one)
            else:
                for number in range(len(self.members)):
                    self.guarded(number, one, number)

        return make

    def hand_over(self, made: Made, take: Take, only: int | None = None) -> None:
        """Every member's result of a block, or one's alone; who can't make or take it is out."""
        if not isinstance(made, list):
            made(take, only)
            return
        for number, value in enumerate(made):
            if value is not None and only in (None, number):
                self.guarded(number, take, number, value)

    def base(self, number: int, fetched: Fetched, i: int, block: int) -> Tensor | None:
        """What a member's result is compared with."""
        return self.runs[number]._base(fetched, i, block)

    def _write(self, items: list[Item], produce: Produce, fetched: Fetched) -> None:
        # Not kept: a cycle of the two would hold on to the windows until it is collected.
        self.context.on_bytes(0, _Outputs(self).write(items, produce, fetched))

    def finish(self) -> dict[str, Receipt]:
        """Make the shards of the members that did not fail visible."""
        found = {}
        for number, (member, run) in enumerate(zip(self.members, self.runs, strict=True)):
            receipt = self.guarded(number, member.receive, run, self.bytes_read)
            if receipt is not None:
                found[member.told.digest] = receipt
        return found


class _Outputs:
    """Fills the windows of all members' writers, block by block."""

    def __init__(self, run: BundleRun) -> None:
        self._run = run
        self._blocks = [own.blocks for own in run.runs if own.blocks is not None]

    def write(self, items: Sequence[Item], produce: Produce, fetched: Fetched) -> int:
        """See `BlockWriter.write`."""
        written = 0
        for coded, some in itertools.groupby(items, self._blocks[0].coded):
            if coded is None:
                written += self._write_blocks(list(some), produce, fetched)
            else:
                written += self._write_codes(list(some), produce, fetched)
        return written

    def _write_codes(self, items: list[Item], produce: Produce, fetched: Fetched) -> int:
        """What is written in 8 bits waits for the largest of many rows: member by member."""
        written = 0
        for number, blocks in enumerate(self._blocks):
            own = partial(self._only, number, produce)
            base = partial(self._run.base, number, fetched)
            written += self._run.guarded(number, blocks.write, items, own, base) or 0
        return written

    def _only(self, number: int, produce: Produce, i: int, block: int) -> Tensor:
        found: list[Tensor] = []
        self._run.hand_over(produce(i, block), lambda _, value: found.append(value), number)
        if not found:
            raise self._run.members[number].error or AssertionError
        return found[0]

    def _write_blocks(self, items: list[Item], produce: Produce, fetched: Fetched) -> int:
        written = 0
        for batch in self._blocks[0].batches(items):
            windows = {
                number: window
                for number, writer in enumerate(self._run.writers)
                if (window := self._run.guarded(number, writer.buffer)) is not None
            }
            fill = partial(self._fill, windows, produce, fetched)
            self._run.context.pool.map(fill, batch)
            nbytes = batch[-1][1] + self._blocks[0].nbytes(batch[-1][0])
            for number, window in windows.items():
                self._run.writers[number].write(window, nbytes)
                written += nbytes
        return written

    def _fill(
        self,
        windows: Mapping[int, Tensor],
        produce: Produce,
        fetched: Fetched,
        placed: tuple[Item, int],
    ) -> None:
        (i, block), offset = placed

        def take(number: int, value: Tensor) -> None:
            if number in windows:
                base = self._run.base(number, fetched, i, block)
                self._blocks[number].fill(windows[number], offset, i, value, base)

        self._run.hand_over(produce(i, block), take)
