"""Means on the sphere: weighted sums whose weights are read off the models' dot products.

Whatever moves along great circles stays in the span of the models, so the result is a weighted sum
of them. Its weights depend on norms and angles alone, which the Gram matrix holds: N x N numbers in
float64 from one pass over the blocks, however long the iteration on them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torch import Tensor

from distmerge.methods.blocks import Granularity
from distmerge.methods.line_dots import column_dot, row_dot
from distmerge.methods.linear import Answers, Weight, shares, soup_call, weighted_sum
from distmerge.methods.method import PerModel
from distmerge.methods.operands import differences, widened
from distmerge.methods.reductions import dots
from distmerge.methods.signature import describe

Gram = np.ndarray[Any, Any]
COLLINEAR = 1.0 - 1e-12
"""Cosine beyond which there is no angle to divide by, whatever the caller asks for."""
NO_DIRECTION = 1e-7
"""A sum of unit vectors shorter than this is rounding error: the Gram matrix knows the squares of
lengths to about 1e-16."""
NO_ARC = 1e-8
"""Sine of an angle between a point and one to which no great circle leads, or all of them do."""
NEVER = 1e-14
"""No step gets shorter than this in float64, whatever tolerance is asked for."""


# --- two models


def _slerp(
    models: list[Tensor],
    base: Tensor | None = None,
    *,
    t: Annotated[float, Field(ge=0, le=1)],
    collinear: Annotated[float, Field(ge=0, le=1)] = 0.9995,
) -> Answers:
    """Spherical interpolation from the base (t=0), or the first model, to the other (t=1).

    Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985. Where the cosine between
    them exceeds `collinear` in magnitude the two are interpolated linearly.
    """
    a, b = models if base is None else (base, models[0])
    gram = yield dots([a, b])
    return weighted_sum([a, b], slerp_weights(gram[0, 0], gram[0, 1], gram[1, 1], t, collinear))


def _nuslerp(
    models: list[Tensor],
    base: Tensor | None = None,
    *,
    weight: PerModel[float],
    nuslerp_row_wise: bool = False,
    nuslerp_flatten: bool = True,
) -> Answers:
    """Spherical interpolation between two models, or between their task vectors if there is a base.

    Shoemake's formula at t = w_2 / (w_1 + w_2). With `nuslerp_flatten: false` each row (the last
    dimension) has an angle of its own, with `nuslerp_row_wise: true` too each column (the first).
    The parameters are mergekit's.
    """
    a, b = models if base is None else differences(models, base)
    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    if nuslerp_flatten:
        gram = yield dots([a, b])
        aa, ab, bb = gram[0, 0], gram[0, 1], gram[1, 1]
    elif nuslerp_row_wise:
        aa, ab, bb = yield [column_dot(a, a), column_dot(a, b), column_dot(b, b)]
    else:
        aa, ab, bb = row_dot(a, a), row_dot(a, b), row_dot(b, b)
    merged = weighted_sum([a, b], slerp_weights(aa, ab, bb, t, COLLINEAR))
    return merged if base is None else base + merged


def slerp_weights(aa: Any, ab: Any, bb: Any, t: float, collinear: float) -> tuple[Weight, Weight]:
    """Weights of both ends from the dot products of a and b: numbers, or arrays of them."""
    norms = [np.sqrt(square) for square in (aa, bb)]
    scale = math.prod(np.where(norm > 1e-8, norm, 1.0) for norm in norms)
    cosine = np.clip(ab / scale, -1.0, 1.0)
    straight = np.abs(cosine) > min(collinear, COLLINEAR)
    angle = np.arccos(np.where(straight, 0.0, cosine))
    first = np.where(straight, 1.0 - t, np.sin((1.0 - t) * angle) / np.sin(angle))
    last = np.where(straight, t, np.sin(t * angle) / np.sin(angle))
    return (first, last) if first.ndim else (float(first), float(last))


def _lines(parameters: Mapping[str, Any], shape: tuple[int, ...]) -> Granularity:
    if parameters.get("nuslerp_flatten", True):
        return "elements"
    # Blocks of rows are matrices, whatever the tensor was; its columns are another matter.
    return "whole" if parameters.get("nuslerp_row_wise", False) and len(shape) > 2 else "rows"


# --- any number of models


def _multislerp(
    models: list[Tensor],
    base: Tensor | None = None,
    *,
    weight: PerModel[float],
    normalize_weights: bool = True,
    eps: Annotated[float, Field(ge=0)] = 1e-8,
) -> Answers:
    """The weighted mean of the models' directions, as long as their weighted mean length; of task
    vectors, if there is a base.

    mergekit's barycentric interpolation: project the directions to the tangent space at their
    normalised weighted mean, add them up, project back. That sum is zero at this very point, so
    the mean is the result. A single model is returned as it is. Directions that cancel each other
    out have no mean: the weighted sum is taken.
    """
    if len(models) == 1:
        return widened(models[0])
    xs = models if base is None else differences(models, base)
    shared = shares(weight, "multislerp", "normalize_weights") if normalize_weights else weight
    gram = yield dots(xs)
    merged = weighted_sum(xs, multislerp_weights(gram, shared, eps))
    return merged if base is None else base + merged


def multislerp_weights(gram: Gram, weight: list[float], eps: float) -> list[float]:
    """Weights of the models, from their Gram matrix and the shares they are to have."""
    norms = np.sqrt(np.diag(gram))
    lengths = np.where(norms + eps > 0.0, norms + eps, 1.0)
    directions = np.array(weight) / lengths
    length = math.sqrt(max(0.0, float(directions @ gram @ directions)))
    if length < max(eps, NO_DIRECTION):
        return weight
    scale = float(norms @ weight) * math.cos(eps) / length
    return [float(scale * w) for w in directions]


def _karcher(
    models: list[Tensor],
    *,
    max_iter: Annotated[int, Field(ge=0)] = 10,
    tol: Annotated[float, Field(ge=0)] = 1e-5,
) -> Answers:
    """The point of the sphere with the least sum of squared angles to the models' directions, as
    long as the models are in the mean.

    Grove and Karcher, "How to conjugate C1-close group actions", 1973, define the mean; it is found
    by going to the mean of the directions in which the models lie, `max_iter` times or until that
    step is shorter than `tol`. Models whose norm is at most `tol` have no direction.
    """
    if len(models) == 1:
        return widened(models[0])
    gram = yield dots(models)
    return weighted_sum(models, karcher_weights(tuple(map(tuple, gram)), max_iter, tol))


@functools.lru_cache(maxsize=256)  # a method is run again on every block of a tensor
def karcher_weights(
    gram: tuple[tuple[float, ...], ...], max_iter: int, tol: float
) -> tuple[float, ...]:
    """Weights of the models, from their Gram matrix."""
    matrix = np.array(gram)
    norms = np.sqrt(np.diag(matrix))
    valid = norms > tol
    weights = np.zeros(len(gram))
    if valid.any():
        cosines = matrix[np.ix_(valid, valid)] / np.outer(norms[valid], norms[valid])
        weights[valid] = norms.mean() * karcher_mean(cosines, max_iter, tol) / norms[valid]
    return tuple(float(w) for w in weights)


def karcher_mean(cosines: Gram, max_iter: int, tol: float) -> Gram:
    """The Karcher mean of unit vectors, as coefficients of them, from their Gram matrix."""
    values, axes = np.linalg.eigh(cosines)
    units = axes * np.sqrt(values.clip(min=0.0))  # rows: the unit vectors, in as many dimensions
    mean: Gram = np.full(len(units), 1.0 / len(units))
    length = np.linalg.norm(mean @ units)
    mean = mean / length if length >= max(tol, NO_DIRECTION) else np.eye(1, len(units))[0]
    for _ in range(max_iter):
        cosine = np.clip(units @ (mean @ units), -1.0, 1.0)
        angle = np.arccos(cosine)
        away = (angle >= tol) & (np.sin(angle) > NO_ARC)
        pull = np.where(away, angle / np.where(away, np.sin(angle), 1.0), 0.0) / len(units)
        tangent = pull - (pull @ cosine) * mean
        step = np.linalg.norm(tangent @ units)
        if step < max(tol, NEVER):
            break
        mean = np.cos(step) * mean + np.sin(step) / step * tangent
        mean = mean / np.linalg.norm(mean @ units)
    return mean


def _slerp_call(count: int, *, tau: float = 0.5, eps: float | None = None) -> dict[str, Any]:
    return {"t": tau} if eps is None else {"t": tau, "collinear": 1.0 - eps}


slerp = describe(
    _slerp,
    name="slerp",
    blocks="elements",
    seamless=True,
    models=(2, 2),
    counts_base=True,
    from_call=_slerp_call,
    raw=True,
    builtin=True,
)
nuslerp = describe(
    _nuslerp,
    name="nuslerp",
    blocks=_lines,
    seamless=lambda parameters: parameters["nuslerp_flatten"],
    models=(2, 2),
    from_call=soup_call,
    raw=True,
    builtin=True,
)
multislerp = describe(
    _multislerp,
    name="multislerp",
    blocks="elements",
    seamless=True,
    from_call=soup_call,
    raw=True,
    builtin=True,
)
karcher = describe(
    _karcher, name="karcher", blocks="elements", seamless=True, raw=True, builtin=True
)
