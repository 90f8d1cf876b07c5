"""What tells one question from another: what is the same in every block, and the block's own
tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from distmerge.methods.difference import Operand, Unmade
from distmerge.methods.reductions import Question


class Said(NamedTuple):
    """A question, taken apart."""

    kind: Hashable
    tensors: list[Operand]
    whole: bool
    """Do kind and tensors tell it from every other question?"""


def said_by(question: Question) -> Said:
    """Take a question apart."""
    plain: list[Hashable] = []
    tensors: list[Operand] = []
    names = _field_names(type(question))
    others = _sort([getattr(question, name) for name in names], plain, tensors)
    return Said((type(question), tuple(plain)), tensors, bool(names) and not others)


def _sort(values: Iterable[Any], plain: list[Hashable], tensors: list[Operand]) -> int:
    """What is plain, with a mark for each tensor, and the tensors; how many are neither."""
    others = 0
    for value in values:
        if isinstance(value, Tensor | Unmade):
            tensors.append(value)
            plain.append(...)
        elif isinstance(value, tuple):
            others += _sort(value, plain, tensors)
        elif value is None or isinstance(value, bool | int | float | str):
            plain.append(value)
        else:
            others += 1
    return others


@cache
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind)) if is_dataclass(kind) else ()
