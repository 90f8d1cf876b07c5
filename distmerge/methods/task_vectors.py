"""Methods on task vectors, the differences between fine-tuned models and their base.

Each is a way to sparsify the task vectors, a way to agree on what is left, and a scale:

    kept = sparsify(model - base)      largest magnitudes | a band of them | at random
    delta = consensus(weight * kept)   sum | mean of those that agree with the elected sign
    merged = base + lambda * delta

Two more are in `distmerge.methods.della` and `distmerge.methods.sce`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from distmerge.methods.bands import band
from distmerge.methods.consensus import Consensus, SignWeighting
from distmerge.methods.cutoff import cutoff
from distmerge.methods.difference import Operand, computed
from distmerge.methods.linear import Answers
from distmerge.methods.method import MergeMethod, PerModel
from distmerge.methods.operands import task_vectors
from distmerge.methods.random import Draw
from distmerge.methods.reductions import Question, Scope
from distmerge.methods.signature import describe
from distmerge.methods.sparsify import Rescale, keep_at_random, rescaled
from distmerge.methods.trim import trim
from distmerge.methods.unrounded import Unrounded

Share = Annotated[float, Field(ge=0, le=1)]
Density = PerModel[Share]


def _task_arithmetic(
    models: list[Tensor],
    base: Tensor,
    *,
    weight: PerModel[float],
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor | Unrounded:
    """base + lambda * sum(w_i (x_i - base)), the sum divided by sum(w_i) if `normalize`.

    Ilharco et al., "Editing models with task arithmetic", 2023, arXiv:2212.04089.
    """
    consensus = Consensus(weight, normalize=normalize, scale=lambda_)
    return consensus.merge(base, task_vectors(models, base))


def _trimmed(
    models: list[Tensor],
    base: Tensor,
    consensus: Consensus,
    ask: Callable[[Operand, int], Question],
    rescale: Rescale,
    density: Sequence[float],
) -> Answers:
    """Merge what is left of task vectors trimmed by their magnitudes: `ask` for the cut of each."""
    deltas = task_vectors(models, base)
    cuts = yield [ask(delta, model) for model, delta in enumerate(deltas)]
    if not rescale:
        return consensus.merge(base, deltas, cuts=cuts)
    whole = [computed(delta) for delta in deltas]
    kept = [trim(delta, cut) for delta, cut in zip(whole, cuts, strict=True)]
    return consensus.merge(base, *(yield from rescaled(whole, kept, rescale, density)))


def _ties(
    models: list[Tensor],
    base: Tensor,
    *,
    weight: PerModel[float],
    density: Density = 1.0,  # type: ignore[assignment]
    normalize: bool = True,
    rescale: Rescale = False,
    lambda_: float = 1.0,
    over: Scope = "tensor",
    sign_weighting: SignWeighting = "weighted",
) -> Answers:
    """Trim each task vector to its largest magnitudes, elect a sign for every parameter, and
    average what agrees with it.

    Yadav et al., "TIES-Merging: Resolving interference when merging models", 2023,
    arXiv:2306.01708. The sign is elected by the weighted sum, with `sign_weighting: paper` by the
    plain one. Thresholds are per tensor; with `over: model` there is one for each model, as in the
    paper.
    """
    consensus = Consensus(weight, sign_weighting, normalize, lambda_)

    def ask(delta: Operand, model: int) -> Question:
        return cutoff(delta, keep=density[model], over=over)

    return (yield from _trimmed(models, base, consensus, ask, rescale, density))


def _banded(
    models: list[Tensor],
    base: Tensor,
    consensus: Consensus,
    density: Sequence[float],
    gamma: Sequence[float],
    rescale: Rescale,
    over: Scope,
) -> Answers:
    def ask(delta: Operand, model: int) -> Question:
        return band(delta, keep=density[model], skip=gamma[model], over=over)

    return (yield from _trimmed(models, base, consensus, ask, rescale, density))


def _breadcrumbs(
    models: list[Tensor],
    base: Tensor,
    *,
    weight: PerModel[float],
    density: Density = 1.0,  # type: ignore[assignment]
    gamma: PerModel[Share] = 0.01,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: Rescale = False,
    lambda_: float = 1.0,
    over: Scope = "tensor",
) -> Answers:
    """Drop of each task vector the share `gamma` of the largest magnitudes, outliers, and of the
    others all but the largest, so that the share `density` is left; add up.

    Davari and Belilovsky, "Model Breadcrumbs: Scaling multi-task model merging with sparse masks",
    2023, arXiv:2312.06795. With `over: model` there is one band for each model.
    """
    consensus = Consensus(weight, None, normalize, lambda_)
    return (yield from _banded(models, base, consensus, density, gamma, rescale, over))


def _breadcrumbs_ties(
    models: list[Tensor],
    base: Tensor,
    *,
    weight: PerModel[float],
    density: Density = 1.0,  # type: ignore[assignment]
    gamma: PerModel[Share] = 0.01,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: Rescale = False,
    lambda_: float = 1.0,
    over: Scope = "tensor",
    sign_weighting: SignWeighting = "weighted",
) -> Answers:
    """breadcrumbs' task vectors, of which only what agrees with the elected sign is added."""
    consensus = Consensus(weight, sign_weighting, normalize, lambda_)
    return (yield from _banded(models, base, consensus, density, gamma, rescale, over))


def _dropped(
    models: list[Tensor],
    base: Tensor,
    consensus: Consensus,
    density: Sequence[float],
    rng: Draw,
    rescale: Rescale,
) -> Answers:
    deltas = task_vectors(models, base)
    pairs = enumerate(zip(deltas, density, strict=True))
    kept = [keep_at_random(delta, keep, rng, model) for model, (delta, keep) in pairs]
    return consensus.merge(base, *(yield from rescaled(deltas, kept, rescale, density)))


def _dare_linear(
    models: list[Tensor],
    base: Tensor,
    *,
    rng: Draw,
    weight: PerModel[float],
    density: Density = 1.0,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: Rescale = True,
    lambda_: float = 1.0,
) -> Answers:
    """Drop entries of the task vectors at random, rescale what is left, add up.

    Yu et al., "Language models are Super Mario", 2024, arXiv:2311.03099. `rescale: density`
    divides by the kept share, as in the paper; `true` restores each tensor's L1 norm.
    """
    consensus = Consensus(weight, None, normalize, lambda_)
    return (yield from _dropped(models, base, consensus, density, rng, rescale))


def _dare_ties(
    models: list[Tensor],
    base: Tensor,
    *,
    rng: Draw,
    weight: PerModel[float],
    density: Density = 1.0,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: Rescale = True,
    lambda_: float = 1.0,
    sign_weighting: SignWeighting = "weighted",
) -> Answers:
    """dare_linear's task vectors, of which only what agrees with the elected sign is added."""
    consensus = Consensus(weight, sign_weighting, normalize, lambda_)
    return (yield from _dropped(models, base, consensus, density, rng, rescale))


def _task_call(
    count: int, *, signs: Sequence[int] | None = None, scaling: float = 1.0
) -> dict[str, Any]:
    return {"weight": [s / count for s in signs or [1] * count], "lambda": scaling}


def _ties_call(
    count: int,
    *,
    k: float = 0.1,
    weights: Sequence[float] | None = None,
    scaling: float = 1.0,
    over: Scope = "tensor",
) -> dict[str, Any]:
    weight = list(weights) if weights is not None else [1.0] * count
    return {"weight": weight, "density": [k] * count, "lambda": scaling, "over": over}


def _dare_call(
    count: int, *, p: float = 0.5, weights: Sequence[float] | None = None, scaling: float = 1.0
) -> dict[str, Any]:
    weight = [w / count for w in weights] if weights is not None else [1 / count] * count
    density = [1.0 - p] * count
    return {"weight": weight, "density": density, "lambda": scaling, "rescale": "density"}


def declared(function: Callable[..., Any], **options: Any) -> MergeMethod:
    """A built-in method under its function's name; elementwise unless `blocks` says otherwise."""
    name = function.__name__.lstrip("_")
    return describe(
        function, name=name, builtin=True, raw=True, **{"blocks": "elements", **options}
    )


task_arithmetic = declared(_task_arithmetic, from_call=_task_call, seamless=True)
ties = declared(_ties, from_call=_ties_call, seamless=True)
breadcrumbs = declared(_breadcrumbs, seamless=True)
breadcrumbs_ties = declared(_breadcrumbs_ties, seamless=True)
dare_linear = declared(_dare_linear, from_call=_dare_call, seamless=True)
dare_ties = declared(_dare_ties, from_call=_dare_call, seamless=True)
