"""Questions about a whole tensor, or the whole model, answered from blocks.

A merge method that needs more than its block yields a question, or a list of questions, and is
sent the answers:

    cuts = yield [cutoff(delta, keep=density) for delta in deltas]

Each question is asked of every block; its partial answers are folded and finished. A question may
need several passes over the blocks, of which the method knows nothing. With `over="model"` the
partials of every tensor are folded, so there is one answer for the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from distmerge.methods.difference import Operand, Thinned, computed, runs_of
from distmerge.methods.fusion import fused_for
from distmerge.methods.operands import elements, loops_for

Scope = Literal["tensor", "model"]


@dataclass(frozen=True, slots=True)
class Again:
    """A question isn't answered yet: ask every block once more, in this state."""

    state: Any


class Question(Protocol):
    """Asked of one block; the three functions are pure."""

    @property
    def over(self) -> Scope: ...

    @property
    def exact(self) -> bool:
        """Partials are integers, or otherwise fold to the same bits in any order."""
        ...

    def partial(self, state: Any) -> Any:
        """What this block has to say. `state` is None on the first pass."""
        ...

    def merge(self, a: Any, b: Any) -> Any:
        """Two partials as one; `a` may be reused for the result."""
        ...

    def finish(self, total: Any, state: Any) -> Any:
        """The answer, or `Again`."""
        ...

    def bare(self) -> Question:
        """The question without its block: enough to merge and finish, and light to send."""
        ...


@runtime_checkable
class Sampled(Protocol):
    """A question for which a sample of the blocks may save passes over all of them."""

    def sampled(self, onto: Any) -> Any:
        """What a part of a block counts; added to `onto`, which is returned, unless it is None."""
        ...

    def bracket(self, sampled: Any) -> Any:
        """A state to begin with, from what was counted; None to begin without."""
        ...


def _finite(x: Tensor) -> Tensor:
    """Non-finite values are kept out of reductions: one NaN must not decide for a tensor."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True, slots=True)
class Sums:
    """Float64 sums of products; `dots`, `total` and `largest` differ only in the operands."""

    operands: tuple[tuple[Operand, Operand | None], ...]
    shape: tuple[int, ...]
    over: Scope = "tensor"
    exact: bool = False

    def partial(self, state: Any) -> np.ndarray[Any, Any]:
        sums = [_sum_of_products(a, b) for a, b in self.operands]
        return np.array(sums, dtype=np.float64)

    def merge(self, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        total: np.ndarray[Any, Any] = a + b
        return total

    def finish(self, total: np.ndarray[Any, Any], state: Any) -> Any:
        if self.shape == ():
            return float(total[0])
        n = self.shape[0]
        gram = np.zeros(self.shape)
        gram[np.tril_indices(n)] = total
        return gram + np.tril(gram, -1).T

    def pieces(self, size: int) -> list[Sums]:
        cut: list[Iterable[Any]] = []
        for a, b in self.operands:
            others = repeat(None) if b is None else runs_of(b, size)
            cut.append(zip(runs_of(a, size), others, strict=b is not None))
        return [replace(self, operands=pairs) for pairs in zip(*cut, strict=True)]

    def bare(self) -> Sums:
        return replace(self, operands=())


def _sum_of_products(a: Operand, b: Operand | None) -> float:
    value = _float64_sum(a, b)
    if math.isfinite(value):
        return value
    return _float64_sum(_finite(computed(a)), None if b is None else _finite(computed(b)))


def _float64_sum(a: Operand, b: Operand | None) -> float:
    pair = [x for x in (a, b) if x is not None]
    fused = loops_for(*pair)
    if fused is not None:
        if b is None:
            return float(fused.total(elements(a)))
        if b is a:
            return float(fused.squares(elements(a)))
        return float(fused.dot(elements(a), elements(b)))
    x = computed(a).double()
    x = x if b is None else x * computed(b).double()
    # torch's own sum, not BLAS: a dot product there may depend on where the operands lie.
    return float(x.sum())


def dots(xs: Sequence[Operand], *, over: Scope = "tensor") -> Sums:
    """The Gram matrix of N tensors: an N x N float64 array of their dot products."""
    pairs = tuple((xs[i], xs[j]) for i in range(len(xs)) for j in range(i + 1))
    return Sums(pairs, (len(xs), len(xs)), over)


def total(x: Tensor, *, over: Scope = "tensor") -> Sums:
    """The sum of all elements, a float."""
    return Sums(((x, None),), (), over)


@dataclass(frozen=True, slots=True)
class Norm:
    """The sum of all magnitudes, a float: the L1 norm."""

    x: Operand
    over: Scope = "tensor"
    exact: bool = False

    def partial(self, state: Any) -> float:
        (found,) = self.partials(max(self.x.shape.numel(), 1)) or [0.0]
        return found

    def partials(self, size: int) -> list[float]:
        """The same of so many elements at a time."""
        fused = fused_for(self.x)
        if fused is not None:
            values: list[float] = fused.magnitudes(elements(self.x), size).tolist()
            if all(map(math.isfinite, values)):
                return values
        whole = [_finite(computed(x).abs()) for x in runs_of(self.x, size)]
        return [_float64_sum(x, None) for x in whole]

    def merge(self, a: float, b: float) -> float:
        return a + b

    def finish(self, total: float, state: Any) -> float:
        return total

    def bare(self) -> Norm:
        return replace(self, x=torch.empty(0))


@dataclass(frozen=True, slots=True)
class Norms:
    """The L1 norm, and that of what sparsifying left: two floats."""

    x: Operand
    kept: Operand
    over: Scope = "tensor"
    exact: bool = False

    def partial(self, state: Any) -> np.ndarray[Any, Any]:
        found = self.partials(max(self.x.shape.numel(), 1))
        return found[0] if len(found) else np.zeros(2)

    def partials(self, size: int) -> np.ndarray[Any, Any]:
        """The same of so many elements at a time, a row for each."""
        fused = fused_for(self.x, self.kept)
        if fused is not None and isinstance(self.kept, Thinned) and self.kept.delta is self.x:
            values = fused.magnitudes_thinned(elements(self.kept), size)
            if np.isfinite(values).all():
                return np.asarray(values)
        return np.array([Norm(self.x).partials(size), Norm(self.kept).partials(size)]).T

    def merge(self, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        total: np.ndarray[Any, Any] = a + b
        return total

    def finish(self, total: np.ndarray[Any, Any], state: Any) -> tuple[float, float]:
        return float(total[0]), float(total[1])

    def bare(self) -> Norms:
        return replace(self, x=torch.empty(0), kept=torch.empty(0))


@dataclass(frozen=True, slots=True)
class MeanSquare:
    """The mean of the squares of all elements, a float; 0 of none."""

    x: Operand
    over: Scope = "tensor"
    exact: bool = False

    def partial(self, state: Any) -> np.ndarray[Any, Any]:
        return np.array([_sum_of_products(self.x, self.x), self.x.shape.numel()], dtype=np.float64)

    def merge(self, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        total: np.ndarray[Any, Any] = a + b
        return total

    def finish(self, total: np.ndarray[Any, Any], state: Any) -> float:
        return float(total[0] / total[1]) if total[1] else 0.0

    def pieces(self, size: int) -> list[MeanSquare]:
        return [replace(self, x=x) for x in runs_of(self.x, size)]

    def bare(self) -> MeanSquare:
        return replace(self, x=torch.empty(0))


def mean_square(x: Operand, *, over: Scope = "tensor") -> MeanSquare:
    """The mean of the squares of all elements, a float."""
    return MeanSquare(x, over)


def in_pieces(question: Question, state: Any, size: int) -> list[Any]:
    """What a block has to say, so many elements at a time if floats are added up."""
    if isinstance(question, Norm | Norms):
        return list(question.partials(size))
    pieces = question.pieces(size) if isinstance(question, Sums | MeanSquare) else [question]
    return [piece.partial(state) for piece in pieces]


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest element, a float."""

    x: Tensor
    over: Scope = "tensor"
    exact: bool = True

    def partial(self, state: Any) -> float:
        finite = torch.where(torch.isfinite(self.x), self.x, -torch.inf)
        return float(finite.max()) if finite.numel() else -math.inf

    def merge(self, a: float, b: float) -> float:
        return max(a, b)

    def finish(self, total: float, state: Any) -> float:
        return total

    def bare(self) -> Largest:
        return replace(self, x=self.x.new_empty(0))


def largest(x: Tensor, *, over: Scope = "tensor") -> Largest:
    """The largest element; -inf for an empty tensor."""
    return Largest(x, over)
