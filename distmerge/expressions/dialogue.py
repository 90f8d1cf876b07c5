"""What one method, on one key, asks of all blocks and is told.

A method that yields questions is a generator; it is run anew on every block, told the answers
that are known, and what it asks next is noted. The end of a round turns the notes into answers.

Where several programs look at the same blocks (`distmerge.methods.sharing`), a dialogue whose
questions another one asks as well follows that one, and takes over its answers.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from distmerge.errors import MethodError
from distmerge.expressions.asked import Answered, Asked
from distmerge.expressions.program import Call
from distmerge.expressions.question_kinds import Said, said_by
from distmerge.expressions.rounds import SAMPLE
from distmerge.methods.random import Draw
from distmerge.methods.reductions import Again, Question, Sampled, in_pieces
from distmerge.methods.sharing import is_shared, once

Place = tuple[int, int, int]
"""Of a question in an expression: node ordinal, ordinal of the yield, place in its list."""

SPARE_COUNTS = 2
"""Of a question whose samples are looked at, at most: arrays that threads add to in turn."""

UNKNOWN: Any = object()
"""A value that needs answers not known yet."""


class Dialogue:
    """One method's questions about one key. `replay` may be called from several threads."""

    def __init__(
        self,
        step: Call,
        key: str,
        seed: int,
        model_answers: Mapping[Place, Any],
        blocks: int,
        canonical: int,
    ) -> None:
        """blocks: how many blocks a round passes over; canonical: elements of the narrow ones."""
        self.step = step
        self.model_partials: dict[Place, tuple[Question, Any]] = {}
        """This key's share in open questions about the whole model."""
        self._key = key
        self._seed = seed
        self._model_answers = model_answers
        self._blocks = blocks
        self._canonical = canonical
        self._lock = threading.Lock()
        self._answers: dict[int, list[Any]] = {}
        self._asked: Asked | None = None
        self._sampled: dict[tuple[int, int], tuple[Sampled, list[Any]]] = {}
        """Questions, each with arrays of what samples counted, to which no thread adds just now."""
        self._hints: dict[tuple[int, int], Any] = {}
        self._returned = False
        self._leader: Dialogue | None = None
        """Who asks what this one asks, until that is answered."""
        self.broken_off = False
        """Has its program failed? Who follows it asks for itself, from the next round on."""

    @property
    def asking(self) -> bool:
        """Is anything open?"""
        return self._asked is not None or bool(self._sampled)

    @property
    def sampled(self) -> bool:
        """Has a sample been noted, or is that of another one taken over?"""
        return bool(self._sampled) or self._leader is not None

    @property
    def follows(self) -> bool:
        """Is what is open asked by another one, too, which looks at the blocks?"""
        return self._leader is not None

    def replay(self, conversation: Generator[Any, Any, Any], index: int, start: int) -> Any:
        """Run the method on block `index`, whose first element is `start`: its result, or
        `UNKNOWN` if it asks something new.

        Raises
            MethodError: it asks other questions than on other blocks, or no questions at all.
        """
        try:
            ordinal, said = 0, next(conversation)
            while True:
                several = isinstance(said, list | tuple)
                questions = list(said) if several else [said]
                if not all(hasattr(question, "partial") for question in questions):
                    raise self._no_question(questions)
                answers = self._known(ordinal, questions)
                if answers is None:
                    self._note(ordinal, questions, index)
                    return UNKNOWN
                bound = [self._bound(a, ordinal, j, start) for j, a in enumerate(answers)]
                said = conversation.send(bound if several else bound[0])
                ordinal += 1
        except StopIteration as stop:
            self._returned = self._returned or index >= 0
            return stop.value

    def _bound(self, answer: Any, ordinal: int, place: int, start: int) -> Any:
        """An answer that draws among equals, given the numbers of this block."""
        if not hasattr(answer, "at"):
            return answer
        return answer.at(Draw(self._seed, (self.step.node, self._key, ordinal, place), start))

    def _known(self, ordinal: int, questions: list[Question]) -> list[Any] | None:
        if ordinal in self._answers:
            if len(self._answers[ordinal]) != len(questions):
                raise self._inconsistent()
            return self._answers[ordinal]
        places = [(self.step.node, ordinal, j) for j in range(len(questions))]
        known = [self._model_answers.get(place) for place in places]
        if all(isinstance(k, Answered) for k in known):
            return [k.answer for k in known if k is not None]
        return None

    def _note(self, ordinal: int, questions: list[Question], index: int) -> None:
        """Note what this block has to say to the questions of one yield."""
        if index == SAMPLE:
            self._note_sample(ordinal, questions)
        if index < 0:
            return
        said = [said_by(question) for question in questions]
        kinds = [one.kind for one in said]
        with self._lock:
            if self._asked is None:
                states = [self._first_state(ordinal, j, q) for j, q in enumerate(questions)]
                blank = [None] * len(questions)
                self._asked = Asked(ordinal, states, questions, kinds, blank)
            asked = self._asked
        if self._returned or asked.ordinal != ordinal or asked.kinds != kinds:
            raise self._inconsistent()
        if self._led(asked, self._first_to_ask(ordinal, questions, said, asked.states)):
            return
        partials = [
            None if isinstance(state, Answered) else self._partial(question, state)
            for question, state in zip(questions, asked.states, strict=True)
        ]
        with self._lock:
            asked.fold(index, partials)

    def _partial(self, question: Question, state: Any) -> Any:
        """What a block has to say: where the order of sums matters, canonical block by block,
        however many of them this is."""
        if question.exact:
            return question.partial(state)
        return in_pieces(question, state, self._canonical)

    def _first_to_ask(
        self,
        ordinal: int,
        questions: Sequence[Question],
        said: Sequence[Said],
        states: Sequence[Any],
    ) -> Dialogue | None:
        """Who asked the same of this block before."""
        if not is_shared() or not all(one.whole for one in said):
            return None
        # Over the model, what has been asked before isn't in the key's own hands.
        known = [s for q, s in zip(questions, states, strict=True) if q.over == "model"]
        what = "asked", ordinal, *(one.kind for one in said), repr(known)
        first = once(what, [x for one in said for x in one.tensors], lambda: self)
        return None if first is self else first

    def _led(self, asked: Asked, first: Dialogue | None) -> bool:
        """Does this round's dialogue follow another? The first block says, the others agree."""
        with self._lock:
            if not asked.begun:
                asked.begun, self._leader = True, first
        if self._leader is not None and self._leader.broken_off:
            return True  # whoever else is the first now has not seen all blocks
        if first is not self._leader:
            raise self._inconsistent()
        return first is not None

    def _first_state(self, ordinal: int, place: int, question: Question) -> Any:
        if question.over == "model":
            return self._model_answers.get((self.step.node, ordinal, place))
        return self._hints.pop((ordinal, place), None)

    # --- a sample, which may save rounds and never changes an answer

    def _note_sample(self, ordinal: int, questions: list[Question]) -> None:
        said = [said_by(question) for question in questions]
        self._leader = self._first_to_ask(ordinal, questions, said, [None] * len(questions))
        if self._leader is not None:
            return
        for j, question in enumerate(questions):
            if isinstance(question, Sampled) and question.over == "tensor":
                with self._lock:
                    _, spare = self._sampled.get((ordinal, j), (question, []))
                    onto = spare.pop() if spare else None
                counts = question.sampled(onto)
                with self._lock:
                    _, spare = self._sampled.setdefault((ordinal, j), (question, []))
                    if len(spare) < SPARE_COUNTS:
                        spare.append(counts)
                    else:
                        spare[0] += counts

    def use_sample(self) -> None:
        """Turn what the sample said into states to begin with."""
        for place, (question, counted) in self._sampled.items():
            if counted:  # else whoever was adding to it has failed
                self._hints[place] = question.bracket(sum(counted))
        self._sampled.clear()
        self._leader = None

    # --- the end of a round

    def finish(self) -> bool:
        """Finish the round's questions. True if another round is worth while; False if all that
        is open waits for answers about the whole model."""
        asked = self._asked
        if asked is None:
            return False
        if self._leader is not None and self._leader.broken_off:
            self._leader = None
            asked.begin_again()
            return True
        if self._leader is not None:
            self._take_over(asked, self._leader)
        elif asked.blocks < self._blocks:
            raise self._inconsistent()
        else:
            self._finish_each(asked)
        self._leader = None
        asked.begin_again()
        if all(isinstance(state, Answered) for state in asked.states):
            self._answers[asked.ordinal] = [state.answer for state in asked.states]
            self._asked = None
            return True
        each = zip(asked.samples, asked.states, strict=True)
        return any(q.over == "tensor" and not isinstance(s, Answered) for q, s in each)

    def _finish_each(self, asked: Asked) -> None:
        for j, (sample, state) in enumerate(zip(asked.samples, asked.states, strict=True)):
            if isinstance(state, Answered):
                continue
            folded = asked.folded[j]
            if sample.over == "model":
                self.model_partials[self.step.node, asked.ordinal, j] = (sample.bare(), folded)
            else:
                said = sample.finish(folded, state)
                asked.states[j] = said.state if isinstance(said, Again) else Answered(said)

    def _take_over(self, asked: Asked, leader: Dialogue) -> None:
        """What the leader, which has finished its round, was told."""
        said = leader._answers.get(asked.ordinal)
        if said is not None:
            asked.states = [Answered(answer) for answer in said]
        elif leader._asked is not None:
            asked.states = list(leader._asked.states)
        for (_, ordinal, j), share in leader.model_partials.items():
            if ordinal == asked.ordinal:
                self.model_partials[self.step.node, ordinal, j] = deepcopy(share)

    def _inconsistent(self) -> MethodError:
        return MethodError(
            f"{self.step.method.name} asks different questions of different blocks of {self._key}.",
            fix="code before a 'yield' must ask the same of every block, whatever its values",
        )

    def _no_question(self, said: Sequence[Any]) -> MethodError:
        wrong = [type(item).__name__ for item in said if not hasattr(item, "partial")]
        return MethodError(
            f"{self.step.method.name} yields what is no question for {self._key}: {wrong[0]}.",
            fix="yield dots(...), cutoff(...), total(...), largest(...) or a list of them",
        )
