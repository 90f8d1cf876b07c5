"""Rows added to a matrix so that their number is a multiple of something: the mean of its rows.

No method of the recipe language: a plan puts it between a model's embeddings and what merges them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from distmerge.methods.blocks import Granularity
from distmerge.methods.linear import Answers
from distmerge.methods.random import Draw
from distmerge.methods.reductions import Scope
from distmerge.methods.signature import describe

Row = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class RowSum:
    """A question: the float64 sum of all rows."""

    rows: Tensor
    over: Scope = "tensor"
    exact: bool = False

    def partial(self, state: Any) -> Row:
        total: Row = self.rows.double().sum(0).cpu().numpy()
        return total

    def merge(self, a: Row, b: Row) -> Row:
        a += b
        return a

    def finish(self, total: Row, state: Any) -> Row:
        return total

    def bare(self) -> RowSum:
        return replace(self, rows=self.rows.new_empty(0))


def _with_mean_rows(models: list[Tensor], rng: Draw, *, known: int) -> Answers:
    """The one matrix, in which every row from `known` on is the mean of those before.

    Of a vector, every element is a row.
    """
    (x,) = models
    width = x.shape[-1] if x.dim() > 1 else 1
    rows = x.reshape(-1, width)
    inside = min(max(known - rng.start // width, 0), len(rows))
    total = yield RowSum(rows[:inside])
    if inside == len(rows):
        return x
    filled = rows.clone()
    filled[inside:] = rows.new_tensor(total / known)
    return filled.view(x.shape)


def _sees(parameters: Mapping[str, Any], shape: tuple[int, ...]) -> Granularity:
    return "rows" if len(shape) > 1 else "elements"


with_mean_rows = describe(
    _with_mean_rows, name="_with_mean_rows", blocks=_sees, models=(1, 1), builtin=True
)
