"""The call form of Fisher merging: importances given, or estimated from pipelines and data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from distmerge.errors import ParameterError
from distmerge.expressions.arithmetic import is_pipeline
from distmerge.expressions.call_help import takes_options
from distmerge.expressions.calls import call_method
from distmerge.expressions.state_dict import StateDict
from distmerge.methods.registry import find_method


@takes_options
def fisher(
    models: Sequence[Any],
    *,
    pipelines: Sequence[Any] | None = None,
    dataset: Iterable[Any] | None = None,
    fishers: Sequence[Any] | None = None,
    eps: float = 1e-8,
    **options: Any,
) -> Any:
    """Merge weighted by how much each model's data cares for each parameter.

    Either `fishers` or `dataset` is given.

    Parameters
        models: of any kind, see `distmerge.expressions.calls.call_method`.
        pipelines: one for each model, or the name of one, with which its diagonal Fisher
            information is estimated; by default the models themselves where they are pipelines,
            else those that their names and `task` load.
        dataset: inputs of the pipelines: texts, or mappings with a `text`; every model sees all.
        fishers: the estimates, one for each model: dicts, or names of importance checkpoints.
        eps: below it a parameter's importance counts as none.
        options: what every call takes.

    Raises
        ParameterError: neither or both were given, or not one for each model.
        what `call_method` raises
    """
    if (fishers is None) == (dataset is None):
        raise ParameterError(
            "fisher needs the models' importances, or data to estimate them from.",
            fix="fisher(models, pipelines=[...], dataset=texts), or fisher(models, fishers=[...])",
        )
    models = list(models)
    if fishers is None:
        fishers = _estimates(models, pipelines, list(dataset or ()), options.get("task"))
    return call_method(find_method("fisher"), models, fishers, eps=eps, **options)


def _estimates(
    models: Sequence[Any], pipelines: Sequence[Any] | None, dataset: list[Any], task: str | None
) -> list[StateDict]:
    from distmerge.importance import estimate_fisher  # a door upward

    given = list(models if pipelines is None else pipelines)
    if len(given) != len(models):
        raise ParameterError(
            f"fisher was given {len(given)} pipelines for {len(models)} models.",
            fix="pipelines=[...], one for each model, in the same order",
        )
    # All are loaded before the first is estimated: a name that leads nowhere shows at once.
    loaded = [one if is_pipeline(one) else _loaded(one, task) for one in given]
    return [StateDict(estimate_fisher(pipeline, dataset)) for pipeline in loaded]


def _loaded(model: Any, task: str | None) -> Any:
    from distmerge.huggingface import load_pipeline  # a door upward

    if not isinstance(model, str | os.PathLike):
        raise ParameterError(
            f"fisher can't estimate from a {type(model).__name__} alone.",
            fix="pipelines=[...], one for each model",
        )
    return load_pipeline(os.fspath(model), task)
