"""Weighted sums of models, with weights that the caller gives."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmerge.errors import ParameterError
from distmerge.methods.fusion import flat
from distmerge.methods.method import PerModel
from distmerge.methods.operands import addresses, bits, raw_loops, widened
from distmerge.methods.parameters import in_float32
from distmerge.methods.signature import describe
from distmerge.methods.unrounded import Unrounded

Answers = Generator[Any, Any, Tensor | Unrounded]
Weight = float | np.ndarray[Any, Any]
"""One number, or an array that broadcasts to the tensor: one for each row or column."""


def weighted_sum(xs: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """sum(w_i x_i), left to right, every product rounded before it is added."""
    loops = raw_loops(*xs)
    if loops is not None and all(isinstance(w, float | int) for w in weights):
        out = torch.empty(xs[0].shape)
        held = [bits(x) for x in xs]
        loops.weighted_sum(addresses(held), np.array(weights, np.float32), held[0], flat(out))
        return out
    wide = [widened(x) for x in xs]
    factors = [
        w if isinstance(w, float | int) else torch.from_numpy(w).to(wide[0]) for w in weights
    ]
    result = wide[0] * factors[0]
    for x, factor in zip(wide[1:], factors[1:], strict=True):
        result += x * factor
    return result


def shares(weights: Sequence[float], method: str, option: str) -> list[float]:
    """The weights divided by their sum.

    Raises
        ParameterError: the sum is zero, or nearly.
    """
    scale = sum(weights)
    if scale == 0.0:
        raise ParameterError(
            f"{method}: the weights add up to zero, which can't be normalised.",
            f"weights: {list(weights)}",
            fix=f"{option}: false",
        )
    found = [w / scale for w in weights]
    if not all(map(in_float32, found)):
        raise ParameterError(
            f"{method}: the weights can't be divided by their sum, since float32 can't hold that.",
            f"they add up to {scale!r}",
            f"weights: {list(weights)}",
            fix=f"{option}: false",
        )
    return found


def _linear(models: list[Tensor], *, weight: PerModel[float], normalize: bool = True) -> Tensor:
    """Weighted average: sum(w_i x_i), divided by sum(w_i) if `normalize`.

    Wortsman et al., "Model soups", 2022, arXiv:2203.05482.
    """
    return weighted_sum(models, shares(weight, "linear", "normalize") if normalize else weight)


def _passthrough(models: list[Tensor], *, scale: PerModel[float | None] = None) -> Tensor:  # type: ignore[assignment]
    """The one model as it is, or times `scale`."""
    return models[0] if scale[0] is None else models[0] * scale[0]


def soup_call(count: int, *, weights: Sequence[float] | None = None) -> dict[str, Any]:
    """The form in which calls give weights: one for each model, all 1 if left out."""
    return {"weight": list(weights) if weights is not None else [1.0] * count}


linear = describe(
    _linear,
    name="linear",
    blocks="elements",
    from_call=soup_call,
    raw=True,
    builtin=True,
    seamless=True,
)
passthrough = describe(
    _passthrough,
    name="passthrough",
    blocks="elements",
    models=(1, 1),
    builtin=True,
    seamless=True,
)
