"""Questions about the whole model: partials of every key folded, in key order, into one answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distmerge.expressions.asked import Answered
from distmerge.expressions.evaluate import Place
from distmerge.methods.reductions import Again, Question

KeyPartials = Mapping[Place, tuple[Question, Any]]


class ModelQuestions:
    """What is known so far. `known` is what evaluations take as `model_answers`."""

    def __init__(self, known: Mapping[Place, Any] | None = None) -> None:
        self.known: dict[Place, Any] = dict(known or {})

    def fold(self, keys: Iterable[KeyPartials]) -> bool:
        """Fold what the keys, in key order, had to say. False if there was nothing to fold."""
        totals: dict[Place, tuple[Question, Any]] = {}
        for partials in keys:
            for place, (question, partial) in partials.items():
                if place in totals:
                    partial = question.merge(totals[place][1], partial)
                totals[place] = (question, partial)
        for place, (question, total) in totals.items():
            said = question.finish(total, self.known.get(place))
            self.known[place] = said.state if isinstance(said, Again) else Answered(said)
        return bool(totals)
