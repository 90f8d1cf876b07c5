"""Calling a merge method: models of any kind in, the same kind out.

ties(["gpt2", "org/legal", "org/recipes"], task="text-generation", k=0.2)     a pipeline
ties([base, legal, recipes], k=0.2)                      modules, dicts or lazy ones, alike
ties(["s3://bucket/base", ...], k=0.2, out="s3://bucket/merged")              streamed there
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from distmerge.errors import ParameterError
from distmerge.expressions.call_arguments import Call, bind
from distmerge.expressions.call_names import first_checkpoint, settle_names
from distmerge.expressions.call_parameters import recipe_parameters
from distmerge.expressions.compiler import check_models
from distmerge.expressions.kinds import Receiver, kind_of, open_models
from distmerge.expressions.lazy import LazyStateDict
from distmerge.expressions.nodes import Apply, Expression, Select
from distmerge.expressions.settings import join_settings
from distmerge.methods.method import MergeMethod

_log = logging.getLogger("distmerge")


def call_method(method: MergeMethod, *args: Any, **keywords: Any) -> Any:
    """Merge.

    Parameters
        args: the list of models, and further lists for methods that take them (fisher's
            importances): names (paths, URLs, Hub ids), modules, pipelines, dicts of tensors or
            lazy state dicts.
        keywords: those of `distmerge.expressions.call_arguments.CallOptions`, and the method's
            own, in the words of its call form or of recipes.

    Returns
        For names a pipeline of the base's, for pipelines another pipeline, for modules another
        module, for dicts a `StateDict`; for lazy or mixed ones a `LazyStateDict`. What a pipeline
        or module is besides its weights comes from the base, else from the first model; where the
        base lacks a head that is passed through, from the first model that has it. With `out`,
        the written checkpoint.

    Raises
        RecipeError, ParameterError, CheckpointError, MismatchError: before any tensor is read.
        MethodError, ReadFailed, SourceChanged, OutputError
    """
    call = bind(method, args, keywords)
    apart = call.method.takes_base and call.base_index is not None
    count = len(call.models) - apart
    if count == 0:
        method.check_count((), f"models[{call.base_index}]")
    parameters = recipe_parameters(method, count, call.parameters)
    stored = call.options.storage_options
    opened = {name: open_models(models, name, stored) for name, models in call.inputs.items()}
    node = _apply(call, opened, parameters)
    models = opened[method.inputs[0]]
    parts = [(lazy.expression, lazy.settings) for lazies in opened.values() for lazy in lazies]
    settings = join_settings(parts, call.options.seed)
    names = settle_names(call, node, models)
    settings = replace(settings, donor=first_checkpoint(models[names.donor]))
    root: Expression = replace(node, passthrough=names.passed)
    if names.kept is not None:
        root = Select(root, names.kept)
    return hand_back(call, LazyStateDict(root, **vars(settings)), names.donor, models)


def _apply(
    call: Call,
    opened: Mapping[str, Sequence[LazyStateDict]],
    parameters: tuple[tuple[str, Any], ...],
) -> Apply:
    method, index = call.method, call.base_index
    lists = {name: [lazy.expression for lazy in lazies] for name, lazies in opened.items()}
    models = lists[method.inputs[0]]
    count, base = len(models), None
    if method.takes_base and index is not None:
        base = models.pop(index)
        for others in list(lists.values())[1:]:
            if len(others) == count:
                others.pop(index)
    for name, others in lists.items():
        if len(others) != len(models):
            raise ParameterError(
                f"{method.name} was given {len(others)} {name} for {len(models)} models.",
                fix=f"one of the {name} for each model, in the same order",
            )
    node = Apply(
        method,
        tuple((name, tuple(members)) for name, members in lists.items()),
        base=base,
        base_index=index,
        parameters=parameters,
        on_missing=call.options.on_missing,
        base_listed=base is None and call.base is not None,
    )
    check_models(node)
    return node


def hand_back(
    call: Call, result: LazyStateDict, donor: int, opened: Sequence[LazyStateDict]
) -> Any:
    """Save the result, or compute it and put it into what the models were."""
    options, kind = call.options, kind_of(call.models)
    if options.verbose:
        _log.info("%s", result.explain())
    if options.out is not None:
        return result.save(
            options.out, overwrite=options.overwrite, storage_options=options.storage_options
        )
    if kind == "lazy":
        return result
    _ = len(result)  # plans every key: models that don't fit together are refused first
    receiver = Receiver(call.models[donor], opened[donor], options.task, options.device)
    return receiver.fill(result.collect())
