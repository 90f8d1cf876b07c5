"""The arguments of a call, sorted out: lists of models, options of every call, parameters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

import torch

from distmerge.errors import ParameterError, RecipeError
from distmerge.expressions.argument_kinds import checked
from distmerge.expressions.nodes import OnMissing
from distmerge.methods.method import MergeMethod


@dataclass(frozen=True)
class CallOptions:
    """The keywords that every call takes, whatever the method; `help()` shows what is told."""

    base_index: int | None = field(
        default=0,
        metadata={"told": "which model is the base, for methods that know one; None for no base"},
    )
    task: str | None = field(
        default=None,
        metadata={"told": "for models given by name: the pipeline's; inferred if left out"},
    )
    passthrough: Iterable[str] | str | None = field(
        default=None,
        metadata={
            "told": "keys, or modules' names, that aren't merged: the mean of the models that "
            "have them, the base left out"
        },
    )
    passthrough_layers: Iterable[str] | str | None = field(
        default=None, metadata={"told": "the same as passthrough; both count"}
    )
    on_missing: OnMissing = field(
        default="error",
        metadata={
            "told": "what becomes of keys that a model lacks: 'error' refuses, 'common' leaves "
            "them out, 'base' takes the base's, 'average' those of the models that have them"
        },
    )
    verbose: bool = field(
        default=False,
        metadata={"told": "log what is merged and how names were matched, to 'distmerge'"},
    )
    out: str | os.PathLike[str] | None = field(
        default=None,
        metadata={"told": "stream the result to this directory or URL, and open that lazily"},
    )
    overwrite: bool = field(
        default=False, metadata={"told": "replace what out holds, a model or other files"}
    )
    device: str | int | torch.device | None = field(
        default=None, metadata={"told": "where the result is put"}
    )
    seed: int | None = field(
        default=None, metadata={"told": "of methods that draw random numbers; 0 if left out"}
    )
    storage_options: Mapping[str, Any] | None = field(
        default=None,
        repr=False,
        metadata={"told": "fsspec's, for models given by URL and for out"},
    )
    framework: Any = field(
        default=None, metadata={"told": "accepted and ignored: everything is torch"}
    )

    @property
    def passed(self) -> frozenset[str]:
        """All of `passthrough` and `passthrough_layers`."""
        given = (self.passthrough, self.passthrough_layers)
        lists = [[some] if isinstance(some, str) else some or () for some in given]
        return frozenset(key for some in lists for key in some)


_CHECKED = {"out", "overwrite", "seed", "storage_options"}
"""Options that `argument_kinds` knows; the device of a result may be any of torch's."""


@dataclass(frozen=True)
class Call:
    """A call, its arguments sorted out."""

    method: MergeMethod
    inputs: Mapping[str, Sequence[Any]]
    """The lists of models, by the name of the method's argument."""
    options: CallOptions
    parameters: Mapping[str, Any]
    base_given: bool
    """Did the caller say which model is the base?"""

    @property
    def models(self) -> Sequence[Any]:
        return self.inputs[self.method.inputs[0]]

    @property
    def base_index(self) -> int | None:
        """Counted from the front. Raises ParameterError if there is no such model."""
        index, count = self.options.base_index, len(self.models)
        if index is None:
            return None
        if not isinstance(index, int) or not -count <= index < count:
            raise ParameterError(
                f"{self.method.name}: base_index={index!r} is none of the {count} models.",
                fix=f"base_index=0 to {count - 1}, or None for no base",
            )
        return index % count

    @property
    def base(self) -> int | None:
        """Which model is the base, as far as this method or the caller knows of one."""
        method = self.method
        known = method.takes_base or "base_index" in method.offered or self.base_given
        return self.base_index if known else None

    @property
    def order(self) -> list[int]:
        """The models' places, the base first."""
        places = range(len(self.models))
        return [p for p in places if p == self.base] + [p for p in places if p != self.base]


def bind(method: MergeMethod, args: Sequence[Any], keywords: Mapping[str, Any]) -> Call:
    """Sort out the arguments of a call.

    Raises
        ParameterError: an argument too many, or a list of models too few.
        RecipeError: something that is no list of models.
    """
    more = list(method.parameters) if method.drops_unknown else []
    places = [*method.inputs, *more]
    named = dict(zip(places, args, strict=False))
    if len(args) > len(places) or named.keys() & keywords.keys():
        raise ParameterError(
            f"{method.name} takes {', '.join(places)} by position, each once.",
            fix="give everything else by name",
        )
    given = {**named, **keywords}
    lacking = [name for name in method.inputs if name not in given]
    if lacking:
        raise ParameterError(
            f"{method.name} needs {lacking[0]!r}, a list.", fix=f"{method.name}([...])"
        )
    inputs = {name: _listed(method, name, given.pop(name)) for name in method.inputs}
    given |= checked(
        method.name, {n: given[n] for n in _CHECKED & given.keys() if given[n] is not None}
    )
    known = {option.name for option in fields(CallOptions)}
    options = CallOptions(**{name: given[name] for name in known & given.keys()})
    _check_options(method, options)
    own = {n: v for n, v in given.items() if n not in known or n in method.parameters}
    if "verbose" in method.parameters or (method.accepts_any and options.verbose):
        own["verbose"] = options.verbose
    if method.accepts_any and "base_index" in given and "base_index" not in method.offered:
        own["base_index"] = options.base_index
    return Call(method, inputs, options, own, "base_index" in given)


def _check_options(method: MergeMethod, options: CallOptions) -> None:
    """Refuse policies that there aren't. Raises ParameterError."""
    _check_device(method, options)
    policies = get_args(OnMissing)
    if options.on_missing not in policies:
        raise ParameterError(
            f"{method.name}: on_missing can't be {options.on_missing!r}.",
            f"it is one of {', '.join(policies)}",
            fix=f"on_missing={policies[0]!r}",
        )
    for name in ("passthrough", "passthrough_layers"):
        given = getattr(options, name)
        listed = isinstance(given, Iterable) and not isinstance(given, bytes)
        names = not isinstance(given, list | tuple) or all(isinstance(key, str) for key in given)
        if given is not None and not (listed and names):
            raise ParameterError(
                f"{method.name}: {name} can't be {given!r}.",
                "it lists keys, or names of modules",
                fix=f"{name}=['lm_head']",
            )


def _check_device(method: MergeMethod, options: CallOptions) -> None:
    """Raises ParameterError: torch knows no such device."""
    try:
        torch.device("cpu" if options.device is None else options.device)
    except (RuntimeError, TypeError) as error:
        raise ParameterError(
            f"{method.name}: device can't be {options.device!r:.60}.",
            str(error).splitlines()[0],
            fix="device='cpu', or 'cuda' where there is one",
        ) from None


def _listed(method: MergeMethod, name: str, models: Any) -> list[Any]:
    if isinstance(models, str | os.PathLike | Mapping | torch.nn.Module) or not isinstance(
        models, Iterable
    ):
        raise RecipeError(
            f"{method.name} takes a list of {name}, not a {type(models).__name__}.",
            fix=f"{method.name}([...])",
        )
    found = list(models)
    if not found:
        raise RecipeError(f"{method.name} was given no {name}.", fix=f"{method.name}([...])")
    return found
