"""What a method's result must be, and that its inputs stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distmerge.errors import MethodError
from distmerge.expressions.program import Call
from distmerge.methods.unrounded import Unrounded


def checked(
    step: Call, outcome: Any, like: Tensor, key: str, dtype: torch.dtype
) -> Tensor | Unrounded:
    """A method's result on a block, flat and in this dtype; or unrounded, where that is allowed.

    Raises
        MethodError: it is no tensor of its inputs' shape, or complex, sparse, or without values.
    """
    if isinstance(outcome, Unrounded):
        return outcome
    if not isinstance(outcome, Tensor):
        got: Any = type(outcome).__name__
    elif outcome.layout != torch.strided or outcome.is_meta:
        got = "a tensor without values" if outcome.is_meta else outcome.layout
    else:
        got = outcome.dtype if outcome.is_complex() else tuple(outcome.shape)
    if got != tuple(like.shape):
        raise MethodError(
            f"{step.method.name} returned {got} for {key}.",
            f"its inputs here have shape {tuple(like.shape)}",
            fix="return one dense tensor of the inputs' shape",
        )
    flat: Tensor = outcome.to(dtype).reshape(-1)
    return flat


def version_of(tensor: Tensor) -> int:
    """Goes up when the tensor is written to, as inference tensors, without a count, can't be."""
    return 0 if tensor.is_inference() else tensor._version
