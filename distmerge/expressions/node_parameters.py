"""A node's parameters for one key: gradients and filters resolved, values checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distmerge.errors import ParameterError
from distmerge.expressions.filters import FilterUse
from distmerge.expressions.nodes import Apply
from distmerge.methods.method import REQUIRED
from distmerge.methods.parameters import (
    LARGEST,
    NO_MATCH,
    Fallback,
    Filtered,
    Layers,
    in_float32,
    resolve,
)

_SHOWN = 5


class NodeParameters:
    """Resolves parameters; what doesn't differ by key is resolved once."""

    def __init__(self) -> None:
        self._constant: dict[int, Mapping[str, Any]] = {}
        self._checked: dict[tuple[int, str, type, Any], Any] = {}
        self.filters = FilterUse()

    def of(
        self, node: Apply, key: str, layers: Layers, own_keys: Sequence[str] = ()
    ) -> Mapping[str, Any]:
        """By name; lists, one value for each model, for per-model parameters. Gradients run over
        `layers`.

        own_keys: what each model calls the key, where layers are moved: filters of its parameters
            see that, as in mergekit.

        Raises
            ParameterError: one is missing, of the wrong type or out of range.
        """
        constant = self._constant.get(id(node))
        if constant is not None:
            return constant
        given = dict(node.parameters)
        resolved = {
            name: self._parameter(node, name, given, key, layers, own_keys)
            for name in node.method.parameters
        }
        for name in given.keys() - resolved.keys():  # a method that takes **kw
            value = _resolve_all(given[name], key, layers)
            if value is not NO_MATCH:
                resolved[name] = value
        if not any(varies(value) for value in given.values()):
            self._constant[id(node)] = resolved
        return resolved

    def _parameter(
        self,
        node: Apply,
        name: str,
        given: Mapping[str, Any],
        key: str,
        layers: Layers,
        own_keys: Sequence[str],
    ) -> Any:
        declared = node.method.parameters[name]
        count = len(node.models)
        if name not in given:
            default = self._required(node, name, key, declared.default)
            return [default] * count if declared.per_model else default
        value = given[name]
        if not declared.per_model:
            self._note(value, key)
            only = self._checked_value(node, name, resolve(value, key, layers), key)
            _check_size(node, name, [only])
            return only
        values = value if isinstance(value, tuple) else (value,) * count
        if len(values) != count:
            raise ParameterError(
                f"{node.method.name}: {name} has {len(values)} values for {count} models.",
                fix="give one for each model, the base not counted",
            )
        pairs = list(zip(values, own_keys or [key] * count, strict=True))
        for one, own in pairs:
            self._note(one, own)
        found = [
            self._checked_value(node, name, resolve(v, key, layers, own), key) for v, own in pairs
        ]
        _check_size(node, name, found)
        return found

    def _note(self, value: Any, name: str) -> None:
        if isinstance(value, Filtered | Fallback):
            self.filters.note(value, name)

    def _checked_value(self, node: Apply, name: str, value: Any, key: str) -> Any:
        declared = node.method.parameters[name]
        if value is NO_MATCH or value is None:
            return self._required(node, name, key, declared.default)
        memo = (id(node), name, type(value), value)  # 1, 1.0 and True are equal
        try:
            if memo not in self._checked:
                self._checked[memo] = declared.check(value, node.method.name)
            return self._checked[memo]
        except TypeError:  # unhashable: a value of the user's own kind
            return declared.check(value, node.method.name)

    def _required(self, node: Apply, name: str, key: str, default: Any) -> Any:
        if default is REQUIRED:
            raise ParameterError(
                f"{node.method.name} needs {name!r}, and nothing gives it for {key}.",
                fix=f"parameters: {{{name}: ...}}",
            )
        return default


def _check_size(node: Apply, name: str, values: Sequence[Any]) -> None:
    """Refuse numbers of a method of ours that are infinite in float32, alone or added up, since
    what is divided by them is zero. Raises ParameterError."""
    floats = [value for value in values if isinstance(value, float)]
    if not node.method.builtin or in_float32(sum(map(abs, floats))):
        return
    alone = all(map(in_float32, floats))
    models = node.models if node.method.parameters[name].per_model else ()
    whose = [f"{model}: {value!r}" for model, value in zip(models, values, strict=bool(models))]
    what = "add up to" if alone else "be"
    raise ParameterError(
        f"{node.method.name}: {name} can't {what} more than float32 holds, {LARGEST:.1e}.",
        ", ".join(whose[:_SHOWN]) or f"{name}: {values[0]!r}",
        fix=f"{name}: 1.0",
    )


def _resolve_all(value: Any, key: str, layers: Layers) -> Any:
    """A parameter that the method didn't declare; a list, where there is a value per model."""
    if isinstance(value, tuple):
        return [_resolve_all(v, key, layers) for v in value]
    return resolve(value, key, layers)


def varies(value: Any) -> bool:
    """Can a parameter's value differ by key?"""
    if isinstance(value, tuple):
        return any(map(varies, value))
    return not isinstance(value, int | float | str | bool | None)
