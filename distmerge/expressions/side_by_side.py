"""One key's programs of several candidates, run block by block: what they have in common is
computed once (`distmerge.methods.sharing`), and what one asks of a block serves all.

To whoever settles and streams evaluations it is an `Evaluation` whose blocks have a result for
each candidate. One that fails is dropped, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from distmerge.errors import DistmergeError
from distmerge.expressions.evaluate import Evaluation
from distmerge.expressions.rounds import Begun, ReadBlock, Span
from distmerge.methods.blocks import Grid
from distmerge.methods.sharing import shared

Failed = Callable[[int, DistmergeError], None]
"""Told the number of a member, and why it has no result."""


class SideBySide:
    """Evaluations of one key, as one. `block` may be called from several threads."""

    def __init__(
        self, members: Sequence[Evaluation], is_out: Callable[[int], bool], failed: Failed
    ) -> None:
        """is_out: whether a member, by number, takes part no more."""
        self.members = members
        self.grid: Grid = members[0].grid
        self._is_out = is_out
        self._failed = failed
        self._firsts: dict[int, Tensor] = {}
        """First blocks of members with no open question, while others have some."""
        reading: dict[Any, list[int]] = {}
        for number, member in enumerate(members):
            reading.setdefault(member.program.leaves, []).append(number)
        self._groups = list(reading.values())
        """Members that read the same: others would have little in common, and much to hold."""

    @property
    def direct(self) -> bool:
        """Does every block have its results in the first round?"""
        return all(member.direct for member in self.members)

    @property
    def sampled(self) -> range:
        """See `Evaluation.sampled`: the same for all that have some."""
        return next((m.sampled for m in self.members if m.sampled), range(0))

    def sample_span(self, index: int) -> Span:
        """See `Evaluation.sample_span`: the same for all that have some."""
        return next(m.sample_span(index) for m in self.members if m.sampled)

    def sample(self, index: int, read: ReadBlock) -> bool:
        """See `Evaluation.sample`."""
        used: list[bool] = []

        def look(number: int) -> None:
            member = self.members[number]
            if member.sampled:
                used.append(member.follows or member.sample(index, read))

        self.each(look)
        return any(used)

    def use_sample(self) -> None:
        """See `Evaluation.use_sample`."""
        for member in self.members:
            member.use_sample()

    def block(self, index: int, read: ReadBlock) -> list[Tensor | None] | None:
        """Every member's result for block `index`, None of one that is out; None if any needs
        answers that aren't known yet. Block 0 is the first of a round."""

        def look(number: int) -> None:
            member = self.members[number]
            if number not in self._firsts and not (index and member.follows):
                value = member.block(index, read)
                if value is not None and index == 0:
                    self._firsts[number] = value

        self.each(look)
        if index or self._asking():
            return None
        return [self._firsts.pop(n, None) for n in range(len(self.members))]

    def begin_round(self, read: ReadBlock) -> Begun:
        """See `Evaluation.begin_round`: who follows whom shows in the first block."""
        value = self.block(0, read)
        return Begun(value is not None, value, range(1, len(self.grid) if value is None else 1))

    def advance(self) -> bool:
        """See `Evaluation.advance`. Leaders come before those that follow them."""
        asking = self._asking()
        progress = [n for n in asking if self._guarded(n, self.members[n].advance)]
        # If those that asked have failed, the results of the others are due.
        return bool(progress) or not self._asking()

    def each(self, do: Callable[[int], Any]) -> None:
        """Do it for every member that takes part, by number; a failure puts it out. Group by group,
        each at a shared block of its own."""
        for group in self._groups:
            with shared():
                for number in group:
                    if not self._is_out(number):
                        self._guarded(number, do, number)

    def _asking(self) -> list[int]:
        out, numbers = self._is_out, range(len(self.members))
        return [n for n in numbers if n not in self._firsts and not out(n)]

    def _guarded(self, number: int, call: Callable[..., Any], *given: Any) -> Any:
        try:
            return call(*given)
        except DistmergeError as error:
            self.members[number].break_off()
            self._failed(number, error)
            return None
