"""The operators of state dicts, written once for those that compute now and those that wait.

A subclass says what one operation does (`_binary`); here is which operations there are, from both
sides, and what may stand on the other side.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

from distmerge.errors import (
    DistmergeError,
    DtypeMismatch,
    ParameterError,
    RecipeError,
    ShapeMismatch,
)
from distmerge.expressions.nodes import OnMissing, Operator
from distmerge.methods.parameters import LARGEST, SMALLEST, in_float32

_OPERATIONS: Mapping[Operator, Callable[[Any, Any], Tensor]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


class Arithmetic:
    """+ - * / and negation, with numbers, tensors, dicts, modules and pipelines on either side.

    `add`, `sub`, `mul` and `div` are the operators with an option: `on_missing="common"` keeps the
    keys that both sides have, where the operators refuse keys that one side lacks.
    """

    __array_ufunc__ = None  # a numpy scalar on the left leaves the operation to us
    __array_priority__ = 1000

    def _binary(
        self,
        operator: Operator,
        other: Any,
        *,
        swapped: bool = False,
        on_missing: OnMissing = "error",
    ) -> Self:
        """`self operator other`, or `other operator self` if swapped; NotImplemented for what
        can't be an operand."""
        raise NotImplementedError

    def _unchanged(self) -> Self:
        """The same values under a new object."""
        raise NotImplementedError

    def __add__(self, other: Any) -> Self:
        return self._binary("+", other)

    def __radd__(self, other: Any) -> Self:
        # sum() begins with a 0 that nobody wrote.
        if type(other) is int and other == 0:
            return self._unchanged()
        return self._binary("+", other, swapped=True)

    def __sub__(self, other: Any) -> Self:
        return self._binary("-", other)

    def __rsub__(self, other: Any) -> Self:
        return self._binary("-", other, swapped=True)

    def __mul__(self, other: Any) -> Self:
        return self._binary("*", other)

    def __rmul__(self, other: Any) -> Self:
        return self._binary("*", other, swapped=True)

    def __truediv__(self, other: Any) -> Self:
        return self._binary("/", other)

    def __rtruediv__(self, other: Any) -> Self:
        return self._binary("/", other, swapped=True)

    def __neg__(self) -> Self:
        return self * -1.0

    def __pos__(self) -> Self:
        return self._unchanged()

    def add(self, other: Any, *, on_missing: OnMissing = "error") -> Self:
        """`self + other`; `on_missing="common"` keeps the keys that both have.

        Raises
            KeyMismatch, ShapeMismatch, DtypeMismatch, ParameterError
        """
        return self._named("+", other, on_missing)

    def sub(self, other: Any, *, on_missing: OnMissing = "error") -> Self:
        """`self - other`; options and errors as in `add`."""
        return self._named("-", other, on_missing)

    def mul(self, other: Any, *, on_missing: OnMissing = "error") -> Self:
        """`self * other`, elementwise; options and errors as in `add`."""
        return self._named("*", other, on_missing)

    def div(self, other: Any, *, on_missing: OnMissing = "error") -> Self:
        """`self / other`, elementwise; options and errors as in `add`."""
        return self._named("/", other, on_missing)

    def _named(self, operator: Operator, other: Any, on_missing: OnMissing) -> Self:
        if on_missing not in ("error", "common"):
            raise ParameterError(
                f"on_missing can't be {on_missing!r} between two state dicts.",
                f"a merge method takes any of {', '.join(get_args(OnMissing))}",
                fix="on_missing='common' or 'error'",
            )
        result: Any = self._binary(operator, other, on_missing=on_missing)
        if result is NotImplemented and isinstance(other, Arithmetic):
            result = other._binary(operator, self, swapped=True, on_missing=on_missing)
        if result is NotImplemented:
            raise DtypeMismatch(
                f"A {type(other).__name__} can't be an operand beside a state dict.",
                fix="a number, a tensor, a dict of tensors, a module or a pipeline",
            )
        return result  # type: ignore[no-any-return]


def as_number(operand: Any) -> float | None:
    """A real number, or a zero-dimensional tensor's or array's value; None for anything else."""
    if isinstance(operand, Tensor | np.ndarray) and operand.ndim == 0:
        operand = operand.item()
    try:
        return float(operand) if isinstance(operand, numbers.Real) else None
    except OverflowError:
        return math.inf


def check_number(operator: Operator, number: float, *, divides: bool) -> None:
    """Refuse a number that float32 makes infinite, or zero where something is divided by it.
    Raises ParameterError."""
    vanishes = operator == "/" and divides and abs(number) <= SMALLEST / 2
    if in_float32(number) and not vanishes:
        return
    does = f"divide by {number!r}" if operator == "/" and divides else f"calculate with {number!r}"
    raise ParameterError(
        f"a merge can't {does}, which float32 doesn't hold.",
        f"it holds numbers from {SMALLEST:.1e} to {LARGEST:.1e}",
        fix="give a number of ordinary size",
    )


def as_tensor(operand: Any) -> Tensor | None:
    """A tensor or numpy array; None for anything else."""
    if isinstance(operand, np.ndarray):
        return torch.from_numpy(operand)
    return operand.detach() if isinstance(operand, Tensor) else None


@contextmanager
def dict_of_tensors(args: tuple[Any, ...]) -> Iterator[None]:
    """Raises RecipeError: no dict can be made of these arguments."""
    try:
        yield
    except DistmergeError:  # of what a lazy one reads
        raise
    except (TypeError, ValueError):
        if not args or isinstance(args[0], Iterator):  # what it yields has failed
            raise
        raise RecipeError(
            f"A StateDict is made of a dict of tensors, not of {args!r:.60}.",
            fix="StateDict({'weight': tensor}), or StateDict.from_model(model)",
        ) from None


def as_tensors(operand: Any) -> Mapping[str, Tensor] | None:
    """The named tensors of a dict, a module or a pipeline; None for anything else."""
    if isinstance(operand, Mapping):
        return operand
    module = module_of(operand)
    if module is None:
        return None
    from distmerge.huggingface import parameters  # a door upward

    return parameters(module)


def module_of(model: Any) -> nn.Module | None:
    """A module itself, or the one inside a pipeline; None for anything else."""
    if isinstance(model, nn.Module):
        return model
    return model.model if is_pipeline(model) else None


def is_pipeline(model: Any) -> bool:
    """Is it what transformers calls a pipeline: something callable around a module?"""
    inside = getattr(model, "model", None)
    return not isinstance(model, nn.Module) and isinstance(inside, nn.Module) and callable(model)


# --- one key


def calculate(
    sign: Operator, key: str, entry: Tensor, operand: float | Tensor, *, swapped: bool = False
) -> Tensor:
    """`entry sign operand`, or the other way round, for an operand that every entry meets.

    Integers and booleans are copied.

    Raises
        ShapeMismatch: the operand doesn't broadcast to the entry's shape.
        DtypeMismatch: the entry is no tensor.
    """
    check_tensor(key, entry)
    if not entry.is_floating_point():
        return entry.detach().clone()
    if isinstance(operand, Tensor):
        if not _broadcasts(operand, entry):
            raise ShapeMismatch(
                f"A tensor of shape {shape_text(operand)} doesn't broadcast to {key}.",
                f"{key} has shape {shape_text(entry)}",
                fix="a number, or {key: tensor} for the entries that are meant",
            )
        operand = operand.to(entry.device)
    left, right = (operand, entry) if swapped else (entry, operand)
    with torch.no_grad():
        return _OPERATIONS[sign](_widened(left), _widened(right))


def calculate_pair(sign: Operator, key: str, left: Tensor, right: Tensor) -> Tensor:
    """`left sign right` for two tensors of one shape, on the left one's device.

    Integers and booleans must be equal and are copied.

    Raises
        DtypeMismatch: they aren't equal.
    """
    right = right.to(left.device)
    if left.is_floating_point() and right.is_floating_point():
        with torch.no_grad():
            return _OPERATIONS[sign](_widened(left), _widened(right))
    if left.dtype != right.dtype or not torch.equal(left, right):
        raise DtypeMismatch(
            f"{key} is not the same on both sides, and only floating-point tensors are "
            "calculated with.",
            f"{left.dtype} and {right.dtype}",
            fix=f"remove([{key!r}]), or .float() it on both sides",
        )
    return left.detach().clone()


def check_tensor(key: str, value: Any) -> None:
    """Raises DtypeMismatch for what is no tensor."""
    if not isinstance(value, Tensor):
        raise DtypeMismatch(
            f"{key} is a {type(value).__name__}, not a tensor.",
            fix="module.state_dict(), or a dict of tensors by name",
        )


def _broadcasts(operand: Tensor, entry: Tensor) -> bool:
    sizes = zip(reversed(operand.shape), reversed(entry.shape), strict=False)
    return operand.ndim <= entry.ndim and all(mine in (1, its) for mine, its in sizes)


def _widened(side: float | Tensor) -> float | Tensor:
    """torch doesn't calculate with 8-bit floats."""
    return side.float() if isinstance(side, Tensor) and _is_8_bit(side.dtype) else side


def _is_8_bit(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


# --- words in errors


def at_most(facts: Sequence[str], most: int = 8) -> list[str]:
    """The first facts, and how many there are beyond them."""
    more = [f"... and {len(facts) - most} more"] if len(facts) > most else []
    return [*facts[:most], *more]


def counted(items: Sequence[Any], noun: str) -> str:
    """`1 key`, `2 keys`."""
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def shape_text(tensor: Tensor) -> str:
    """`768 x 3072`; `scalar` for a tensor without dimensions."""
    return " x ".join(map(str, tensor.shape)) or "scalar"
