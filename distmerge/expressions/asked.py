"""The questions of one yield while they are open: what the blocks have said so far."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from distmerge.methods.reductions import Question


@dataclass(frozen=True, slots=True)
class Answered:
    """A question's final answer, as opposed to a state to ask again in."""

    answer: Any


@dataclass
class Asked:
    """The questions of one yield while they are open."""

    ordinal: int
    states: list[Any]
    """Per question: None at first, then what `Again` said, `Answered` when done."""
    samples: list[Question]
    kinds: list[Hashable]
    """Per question, all of it but its block: what every block has to ask alike."""
    folded: list[Any]
    """Per question, the fold of partials: as they come if they are exact in any order, else those
    of the first blocks."""
    blocks: int = 0
    """How many blocks, in order, are folded."""
    waiting: dict[int, list[Any]] = field(default_factory=dict)
    """Of later blocks, the partials whose order matters, piece by piece: all of them together could
    be as large as the tensor."""
    begun: bool = False
    """Has a block been looked at in this round?"""

    def fold(self, index: int, partials: list[Any]) -> None:
        """Add what a block has to say: None to questions that are answered, to those that are not
        exact what each of its pieces says."""
        waits: list[Any] = [None] * len(partials)
        for j, (question, partial) in enumerate(zip(self.samples, partials, strict=True)):
            if question.exact and partial is not None:
                self._add(j, partial)
            else:
                waits[j] = partial
        self.waiting[index] = waits
        while self.blocks in self.waiting:
            for j, pieces in enumerate(self.waiting.pop(self.blocks)):
                for partial in pieces or ():
                    if partial is not None:
                        self._add(j, partial)
            self.blocks += 1

    def _add(self, j: int, partial: Any) -> None:
        before = self.folded[j]
        self.folded[j] = partial if before is None else self.samples[j].merge(before, partial)

    def begin_again(self) -> None:
        """Forget the partials, for another round."""
        self.folded, self.blocks, self.begun = [None] * len(self.states), 0, False
