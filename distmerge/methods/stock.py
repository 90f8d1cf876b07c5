"""Model stock: how far to go from the base towards the mean of the models, by their angles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from distmerge.errors import ParameterError
from distmerge.methods.blocks import Granularity
from distmerge.methods.line_dots import row_dot
from distmerge.methods.linear import Answers, Weight, weighted_sum
from distmerge.methods.operands import differences, task_vectors
from distmerge.methods.reductions import Scope, dots
from distmerge.methods.signature import describe


def _model_stock(
    models: list[Tensor], base: Tensor, *, filter_wise: bool = False, over: Scope = "tensor"
) -> Answers:
    """t * mean(models) + (1 - t) * base, t = N c / (1 + (N - 1) c), c the mean cosine between
    the models' offsets from the base.

    Jang et al., "Model Stock: All we need is just a few fine-tuned models", 2024,
    arXiv:2403.19522. With `filter_wise` every row has a c of its own, and so a t; with
    `over: model` there is one for the whole model.
    """
    n = len(models)
    if filter_wise:
        if over == "model":
            raise ParameterError(
                "model_stock: a ratio for each row and one for the whole model exclude each other.",
                fix="leave out 'filter_wise' or 'over'",
            )
        offsets = differences(models, base)
        cosine = mean_cosine(n, lambda i, j: row_dot(offsets[i], offsets[j]))
    else:
        gram = yield dots(task_vectors(models, base), over=over)
        cosine = mean_cosine(n, lambda i, j: gram[i, j])
    t = stock_ratio(cosine, n)
    return weighted_sum([base, *models], [1.0 - t] + [t / n] * n)


def mean_cosine(n: int, dot: Callable[[int, int], Any]) -> Any:
    """Of all pairs among n vectors, from their dot products: numbers, or arrays of them."""
    norms = [np.sqrt(dot(i, i)) for i in range(n)]
    pairs = [(i, j) for i in range(n) for j in range(i)]
    total = sum(dot(i, j) / np.maximum(norms[i] * norms[j], 1e-6) for i, j in pairs)
    return total / len(pairs)


def stock_ratio(cosine: Any, n: int) -> Weight:
    """The interpolation ratio of n models; zero where it has a pole."""
    denominator = 1.0 + (n - 1) * cosine
    pole = np.abs(denominator) < 1e-6
    ratio = np.where(pole, 0.0, n * cosine / np.where(pole, 1.0, denominator))
    return ratio if ratio.ndim else float(ratio)


def _filters(parameters: Mapping[str, Any], shape: tuple[int, ...]) -> Granularity:
    return "rows" if parameters.get("filter_wise", False) else "elements"


def _no_parameters(count: int) -> dict[str, Any]:
    return {}


model_stock = describe(
    _model_stock,
    name="model_stock",
    blocks=_filters,
    seamless=lambda parameters: not parameters["filter_wise"],
    models=(2, None),
    from_call=_no_parameters,
    raw=True,
    builtin=True,
)
