"""From a function's signature to a `MergeMethod`.

    @layer_merge
    def median(models, **kw):
        return torch.median(torch.stack(models), 0).values

Everything that can be known of a function is checked when it is decorated; a call passes by name
only what the function declared.
"""

from __future__ import annotations

import contextlib
import inspect
import typing
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from distmerge.errors import MethodError
from distmerge.methods.blocks import Granularity
from distmerge.methods.method import OFFERED, PER_MODEL, REQUIRED, MergeMethod, Parameter, Sight


def _name_of(function: Any) -> str:
    if not callable(function) or not hasattr(function, "__name__"):
        raise MethodError(
            f"A merge method is a function with a name, and {function!r:.60} is none.",
            fix="def merge(models, **kw): ...",
        )
    return str(function.__name__)


def describe(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    inputs: tuple[str, ...] | None = None,
    blocks: bool | Granularity | Sight | None = None,
    models: tuple[int, int | None] = (1, None),
    counts_base: bool = False,
    from_call: Callable[..., dict[str, Any]] | None = None,
    raw: bool = False,
    builtin: bool = False,
    seamless: bool | Callable[[Mapping[str, Any]], bool] = False,
) -> MergeMethod:
    """Read a function's signature into a `MergeMethod`, whose fields say what the options are.

    Raises
        MethodError: the signature can't be that of a merge method.
    """
    name = name or _name_of(function)
    signature = inspect.signature(function).parameters
    inputs = inputs if inputs is not None else tuple(list(signature)[:1])
    missing = [i for i in inputs if i not in signature]
    if missing or not inputs:
        raise MethodError(
            f"{name}{inspect.signature(function)} has no argument "
            f"{', '.join(missing) or 'at all'}.",
            fix=f"def {name}(models, **kw): ...",
        )
    rest = [p for p in signature.values() if p.name not in inputs]
    kinds = inspect.Parameter
    if any(p.kind in (kinds.POSITIONAL_ONLY, kinds.VAR_POSITIONAL) for p in signature.values()):
        raise MethodError(
            f"{name}{inspect.signature(function)} takes positional-only arguments.",
            fix="arguments are passed by name: leave out '/' and '*args'",
        )
    hints = _hints(function)
    declared = [p for p in rest if p.name not in OFFERED and p.kind is not kinds.VAR_KEYWORD]
    parameters = {p.name: p for p in (_parameter(d, hints) for d in declared)}
    base = signature.get("base")
    return MergeMethod(
        name=name,
        function=function,
        parameters=parameters,
        inputs=inputs,
        granularity=_granularity(name, blocks, inspect.isgeneratorfunction(function)),
        takes_base=base is not None,
        base_required=base is not None and base.default is REQUIRED,
        models=models,
        counts_base=counts_base,
        from_call=from_call,
        accepts_any=any(p.kind is kinds.VAR_KEYWORD for p in rest),
        offered=frozenset(p.name for p in rest if p.name in OFFERED),
        raw=raw,
        builtin=builtin,
        seamless=seamless,
    )


def _granularity(
    name: str, blocks: bool | Granularity | Sight | None, generator: bool
) -> Granularity | Sight:
    if callable(blocks):
        return blocks
    if isinstance(blocks, str):
        if blocks not in typing.get_args(Granularity):
            raise MethodError(f"{name}: blocks can't be {blocks!r}.", fix="'rows' or 'elements'")
        return blocks
    if blocks is None:
        # A function that yields questions has said that it works on pieces.
        return "rows" if generator else "whole"
    return "rows" if blocks else "whole"


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    found = {}
    known = getattr(function, "__globals__", {})
    for name, hint in getattr(function, "__annotations__", {}).items():
        alone = SimpleNamespace(__annotations__={name: hint})
        # One by one: some may be annotations that only a type checker can read.
        with contextlib.suppress(NameError, TypeError, SyntaxError):
            found.update(typing.get_type_hints(alone, known, include_extras=True))
    return found


def _parameter(declared: inspect.Parameter, hints: Mapping[str, Any]) -> Parameter:
    hint = hints.get(declared.name, Any)
    per_model = PER_MODEL in typing.get_args(hint)
    if per_model:
        hint = typing.get_args(typing.get_args(hint)[0])[0]
    return Parameter(declared.name.rstrip("_"), declared.name, hint, declared.default, per_model)
