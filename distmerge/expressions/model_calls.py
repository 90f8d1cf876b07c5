"""Calling a function of whole state dicts: every model is in memory, under the base's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from torch import Tensor

from distmerge.errors import DistmergeError, MethodError, ParameterError
from distmerge.expressions.call_arguments import Call, bind
from distmerge.expressions.call_names import Names, first_checkpoint, output_names, settle_names
from distmerge.expressions.call_parameters import recipe_parameters
from distmerge.expressions.calls import hand_back
from distmerge.expressions.compiler import passes
from distmerge.expressions.eager import evaluate_eagerly
from distmerge.expressions.kinds import open_models
from distmerge.expressions.lazy import LazyStateDict
from distmerge.expressions.nodes import Apply, Binary, TensorLeaf
from distmerge.expressions.settings import join_settings
from distmerge.expressions.state_dict import StateDict
from distmerge.methods.declare import ModelMethod
from distmerge.methods.registry import find_method


def call_model_method(method: ModelMethod, *args: Any, **keywords: Any) -> Any:
    """Merge with a function of state dicts; arguments, result and errors as for `call_method`."""
    call = bind(method.description, args, keywords)
    models = open_models(call.models, storage_options=call.options.storage_options)
    parts = [(model.expression, model.settings) for model in models]
    settings = join_settings(parts, call.options.seed)
    together = reduce(lambda a, b: Binary("+", a, b), (expression for expression, _ in parts))
    names = settle_names(call, together, models)
    dicts = [_renamed(model, names) for model in models]
    bodies = [_part(tensors, names.passed, inside=False) for tensors in dicts]
    heads = [_part(tensors, names.passed, inside=True) for tensors in dicts]
    merged = {**_invoke(call, bodies), **_mean_heads(call, heads)}
    order = dict.fromkeys([*names.inputs.keys, *merged])
    leaf = TensorLeaf({k: merged[k] for k in order if k in merged}, method.description.name)
    settings = replace(settings, donor=first_checkpoint(models[names.donor]))
    return hand_back(call, LazyStateDict(leaf, **vars(settings)), names.donor, models)


def _renamed(model: LazyStateDict, names: Names) -> StateDict:
    """A model's tensors under the output's names."""
    tensors = model.collect()
    pairs = output_names(model, names.inputs).items()
    return StateDict((k, tensors[own]) for k, own in pairs if names.kept is None or k in names.kept)


def _part(tensors: StateDict, passed: frozenset[str], *, inside: bool) -> StateDict:
    return StateDict((k, v) for k, v in tensors.items() if passes(k, passed) == inside)


def _mean_heads(call: Call, heads: Sequence[StateDict]) -> dict[str, Tensor]:
    """Heads as a layer-wise method's call averages them: the base's count only if alone."""
    alone = {} if call.base is None else dict(heads[call.base])
    trained = [own for place, own in enumerate(heads) if place != call.base]
    if not any(trained):
        return alone
    root = Apply(
        find_method("linear"),
        (("models", tuple(TensorLeaf(own) for own in trained)),),
        parameters=(("weight", 1.0),),
        on_missing="average",
    )
    return {**alone, **evaluate_eagerly(root)}


def _invoke(call: Call, models: list[StateDict]) -> StateDict:
    method, index = call.method, call.base_index
    passed: dict[str, Any] = {"base_index": index} if "base_index" in method.offered else {}
    if method.takes_base and index is not None:
        passed["base"] = models.pop(index)
    elif method.base_required:
        raise ParameterError(f"{method.name} needs a base model.", fix="base_index=0")
    recipe_parameters(method, len(models), call.parameters)  # refuses what doesn't fit
    for name, value in call.parameters.items():
        declared = method.parameters.get(name)
        passed[declared.keyword if declared else name] = value
    try:
        merged = method.function(**{method.inputs[0]: models}, **passed)
    except DistmergeError:
        raise
    except (Exception, SystemExit) as error:
        raise MethodError(
            f"{method.name} failed: {type(error).__name__}: {error}",
            fix=f"try it on small dicts: {method.name}.__wrapped__([...])",
        ) from error
    if not isinstance(merged, Mapping):
        raise MethodError(
            f"{method.name} returned a {type(merged).__name__}.",
            fix="return a StateDict, or a dict of tensors",
        )
    return StateDict(merged)
