"""Between names of models and transformers' pipelines."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distmerge.errors import (
    CheckpointError,
    CheckpointNotFound,
    DistmergeError,
    ParameterError,
    SourceChanged,
)
from distmerge.huggingface.modules import load_into
from distmerge.huggingface.options import call_options, loading_options, without_dropped
from distmerge.huggingface.tasks import infer_task

if TYPE_CHECKING:
    from transformers import Pipeline


def load_pipeline(name: str, task: str | None = None, **options: Any) -> Pipeline:
    """Load a pipeline with today's transformers, whatever the caller was written for.

    Parameters
        name: a local directory (which wins over a Hub id of the same spelling), a Hub id
            `org/name`, `org/name@revision` or `hf://org/name@revision`.
        task: of transformers' pipelines; by default inferred from config.json, offline too.
        options: of `transformers.pipeline`; those that it no longer takes (`framework`, ...) are
            accepted and dropped, here and in calls of the pipeline.

    Raises
        CheckpointNotFound, AccessDenied, CheckpointError: the model can't be loaded.
        ParameterError: no such task, or none can be inferred.
    """
    import transformers

    place, revision = split_revision(name)
    current = loading_options(options)
    if revision is not None:
        current["revision"] = revision
    task = task or infer_task(_config(place, current))
    current.setdefault("pipeline_class", _tolerant(_pipeline_class(task)))
    make: Any = transformers.pipeline
    try:
        pipe: Pipeline = make(task, place, **current)
    except (OSError, ValueError) as error:
        raise _unusable(place, revision, error) from error
    return pipe


def pipeline_around(task: str, model: nn.Module, **parts: str) -> Pipeline:
    """A pipeline around a model; its other parts are loaded from these folders, as far as the task
    has a use for them."""
    import transformers

    make: Any = transformers.pipeline
    made: Pipeline = make(task, model, pipeline_class=_tolerant(_pipeline_class(task)), **parts)
    return made


def to_pipeline(
    tensors: Mapping[str, Tensor],
    name: str,
    task: str | None = None,
    *,
    device: str | int | torch.device | None = None,
    **options: Any,
) -> Pipeline:
    """A fresh pipeline of `name` that runs with exactly these weights, copied.

    Parameters
        tensors: one for each parameter of the model, under its names or a file's.
        device: where the pipeline runs; transformers' choice by default.

    Raises
        KeyMismatch, ShapeMismatch: the tensors are not the parameters of that model.
        CheckpointNotFound, AccessDenied, CheckpointError, ParameterError: as `load_pipeline`.
    """
    if device is not None:
        options["device"] = device
    pipe = load_pipeline(name, task, **options)
    load_into(pipe.model, tensors)
    return pipe


def like_pipeline(pipe: Any, module: nn.Module) -> Any:
    """Another pipeline like `pipe`, around `module`.

    Options that transformers has dropped are forgotten where `pipe` was built with them (`pipeline`
    takes them, and every call then fails), and calls may carry them.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(pipe, transformers.Pipeline):
        made = copy.copy(pipe)
    else:
        made = _restore(type(pipe), pipe.__dict__)
        for kept in ("_preprocess_params", "_forward_params", "_postprocess_params"):
            setattr(made, kept, without_dropped(getattr(made, kept)))
    made.model = module
    return made


def split_revision(name: str) -> tuple[str, str | None]:
    """`org/name@revision` -> (`org/name`, `revision`); a local directory -> (itself, None).

    Raises
        CheckpointError: a URL that transformers can't load from.
    """
    place = os.path.expanduser(name.removeprefix("file://"))
    if os.path.exists(place):
        return place, None
    place = name.removeprefix("hf://")
    if "://" in place:
        scheme = place.partition("://")[0]
        raise CheckpointError(
            f"A pipeline can't be loaded from a {scheme}:// URL.",
            fix="copy the model to a local directory, and name that",
        )
    repo, _, revision = place.partition("@")
    return repo, revision or None


def _config(place: str, options: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    wanted = ("revision", "token", "trust_remote_code", "local_files_only", "code_revision")
    known = {key: options[key] for key in wanted if key in options}
    nested = options.get("model_kwargs", {})
    known |= {key: nested[key] for key in ("cache_dir", "subfolder") if key in nested}
    try:
        return AutoConfig.from_pretrained(place, **known)
    except (OSError, ValueError) as error:
        raise _unusable(place, options.get("revision"), error) from error


def _pipeline_class(task: str) -> type[Pipeline]:
    from transformers.pipelines import check_task

    try:
        implementation = check_task(task)[1]["impl"]
    except KeyError as error:
        raise ParameterError(
            f"No pipeline does the task {task!r}.",
            str(error.args[0] if error.args else error),
            fix="task='text-generation', or leave task out to have it inferred",
        ) from error
    if isinstance(implementation, str):
        module, _, attribute = implementation.rpartition(".")
        implementation = getattr(importlib.import_module(module), attribute)
    found: type[Pipeline] = implementation
    return found


class _Tolerant:
    """What `_tolerant` has made already."""


@functools.cache
def _tolerant(base: type[Pipeline]) -> type[Pipeline]:
    """The same pipeline, but calls may carry options that transformers has dropped."""
    if issubclass(base, _Tolerant):
        return base
    inherited: Any = base._sanitize_parameters

    def sanitize(self: Any, **options: Any) -> Any:
        return inherited(self, **call_options(options))

    def reduce(self: Any) -> Any:
        return _restore, (base, self.__dict__)

    members = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "_sanitize_parameters": sanitize,
        "__reduce__": reduce,
    }
    return type(base.__name__, (_Tolerant, base), members)


def _restore(base: type[Pipeline], state: dict[str, Any]) -> Pipeline:
    pipe = object.__new__(_tolerant(base))
    pipe.__dict__.update(state)
    return pipe


def _unusable(name: str, revision: str | None, error: Exception) -> DistmergeError:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    from distmerge.checkpoints.hub_errors import explain_hub

    refusals = (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled)
    for cause in _causes(error):
        explained = explain_hub(cause, name, revision) if isinstance(cause, refusals) else None
        if explained is not None and not isinstance(explained, SourceChanged):
            return explained
    kind = CheckpointNotFound if isinstance(error, OSError) else CheckpointError
    return kind(
        f"{name} can't be loaded as a model.",
        _gist(str(error)),
        fix="name a local directory or a Hub id that holds config.json and weights",
    )


def _causes(error: BaseException) -> Iterator[Exception]:
    cause: BaseException | None = error
    while isinstance(cause, Exception):
        yield cause
        cause = cause.__cause__ or cause.__context__


def _gist(text: str) -> str:
    """The sentence that matters in a message that may hold whole tracebacks."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = [line for line in lines if line.partition(":")[0].endswith("Error")]
    return (causes or lines or [""])[-1 if causes else 0]
