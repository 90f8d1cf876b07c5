"""The boundary between parameter values as recipes spell them and as methods take them.

weight: 0.5                                      the same everywhere
weight: [0, 0.3, 0.7, 1]                         a gradient over the layers
weight: {filter: mlp, value: 0.5}                where the key holds `mlp`
weight: [{filter: mlp, value: [0, 1]}, {value: 0.2}]     the first that fits counts
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from distmerge.credentials import redact
from distmerge.errors import ParameterError
from distmerge.expressions.recipe_text import Document, at_path
from distmerge.expressions.yaml_lines import KeyPath
from distmerge.methods.method import MergeMethod, Parameter
from distmerge.methods.parameters import Fallback, Filtered, Gradient, in_float32, too_large

Values = dict[str, Any]
"""Parameter name -> a scalar of the declared type, a `Gradient` or a `Filtered`."""
_FORMS = "{name}: 0.5, {name}: [0, 1], or {name}: [{{filter: mlp, value: 0.5}}, {{value: 0}}]"


def read_values(
    given: Mapping[str, Any], path: KeyPath, method: MergeMethod, document: Document
) -> Values:
    """The method's own parameters among those given, checked; null means not given.

    Raises
        ParameterError: of the wrong type or form, out of range, not finite; names the line.
    """
    values = {}
    for name, value in given.items():
        declared = method.parameters.get(name)
        if declared is None and method.accepts_any:
            declared = Parameter(name, name, Any, None, per_model=False)
        if declared is None or value is None:
            continue
        try:
            found = _read(value, declared, method.name)
        except ParameterError as error:
            where = document.where((*path, name)) + _whose(path, document)
            raise ParameterError(error.headline, *error.facts, where, fix=error.fix) from None
        if isinstance(found, Filtered):  # which of them fit nothing shows later, by headers
            items = [(*path, name, i) for i in range(len(found.choices))]
            at = items if isinstance(value, list) else [(*path, name)]
            found = replace(found, places=tuple(map(document.where, at)))
        values[name] = found
    return values


def _whose(path: KeyPath, document: Document) -> str:
    """The model whose parameters stand there, for a message."""
    owner = at_path(document.data, path[:-1])
    model = owner.get("model") if isinstance(owner, Mapping) and len(path) > 1 else None
    return f", for {redact(model)[:200]}" if isinstance(model, str) else ""


def combine(levels: Iterable[Any]) -> Any:
    """One value of several levels of precedence, the first level counting most; None of none."""
    kept = []
    for level in levels:
        if level is None:
            continue
        kept.append(level)
        if not isinstance(level, Filtered) or any(p in (None, "*") for p, _ in level.choices):
            break  # it has a value for every key
    return Fallback(tuple(kept)) if len(kept) > 1 else kept[0] if kept else None


def _read(value: Any, declared: Parameter, method: str) -> Any:
    if isinstance(value, Mapping):
        return Filtered((_choice(value, declared, method),))
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return Filtered(tuple(_choice(item, declared, method) for item in value))
    return _scalar_or_gradient(value, declared, method)


def _choice(item: Any, declared: Parameter, method: str) -> tuple[str | None, Any]:
    name = declared.name
    if not isinstance(item, Mapping) or "value" not in item:
        raise _malformed(declared, method, "each item needs a value, and may have a filter")
    pattern = item.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        raise _malformed(declared, method, f"a filter is part of a tensor's name, not {pattern!r}")
    if item["value"] is None or isinstance(item["value"], Mapping):
        raise _malformed(declared, method, f"{name} for the filter {pattern!r} has no plain value")
    return pattern, _scalar_or_gradient(item["value"], declared, method)


def _scalar_or_gradient(value: Any, declared: Parameter, method: str) -> Any:
    if not isinstance(value, list):
        return _checked(value, declared, method)
    if not value or any(isinstance(item, list | Mapping) or item is None for item in value):
        raise _malformed(declared, method, "a list is a gradient over the layers: plain values")
    return Gradient(tuple(_checked(item, declared, method) for item in value))


def _checked(value: Any, declared: Parameter, method: str) -> Any:
    checked = declared.check(value, method)
    if not in_float32(checked):
        raise too_large(method, declared.name, checked)
    return checked


def _malformed(declared: Parameter, method: str, reason: str) -> ParameterError:
    return ParameterError(
        f"{method}: {declared.name} is not of a form that a parameter can have.",
        reason,
        fix=_FORMS.format(name=declared.name),
    )
