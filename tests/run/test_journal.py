"""Answers about the whole model, kept for a run that goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from distmerge.expressions.asked import Answered
from distmerge.methods.cutoff import EVERYTHING, NOTHING, Cut
from distmerge.run.journal import journal_path, load_answers, save_answers
from distmerge.write.local_output import LocalOutput

DIGEST = "0" * 32
ANSWERS: list[Any] = [
    0.1,
    -math.inf,
    5e-324,
    Cut(0.1, 1 / 3),
    Cut(0.1, 1 / 3, single=True),
    NOTHING,
    EVERYTHING,
    np.array([[1.0, 0.1], [0.1, 1e300]]),
]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b)


def test_answers_come_back_in_every_bit(tmp_path):
    output = LocalOutput(tmp_path)
    known = {(i, 0, i + 1): Answered(answer) for i, answer in enumerate(ANSWERS)}
    save_answers(output, DIGEST, known)
    found = load_answers(output, DIGEST)
    assert found.keys() == known.keys()
    for place, state in found.items():
        assert isinstance(state, Answered)
        assert same(state.answer, known[place].answer)
    assert load_answers(output, "1" * 32) == {}


@dataclass
class Own:
    """A user's own kind of answer."""

    value: int


def test_answers_of_a_users_own_kind_are_asked_again(tmp_path):
    output = LocalOutput(tmp_path)
    save_answers(output, DIGEST, {(0, 0, 0): Answered(0.5), (1, 0, 0): Answered(Own(3))})
    assert load_answers(output, DIGEST) == {}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '[{"place": [0, 0], "answer": {}}]', "[3]"]
)
def test_a_journal_that_makes_no_sense_is_none(tmp_path, text):
    output = LocalOutput(tmp_path)
    output.write_bytes(journal_path(DIGEST), text.encode())
    assert load_answers(output, DIGEST) == {}
