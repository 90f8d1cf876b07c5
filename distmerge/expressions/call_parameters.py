"""The boundary between the keywords of a Python call and the parameters of recipes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

from distmerge.errors import ParameterError
from distmerge.expressions.call_arguments import CallOptions
from distmerge.methods.method import REQUIRED, MergeMethod
from distmerge.methods.parameters import Fallback, Filtered, Gradient, in_float32, too_large

CALL_WORDS: Mapping[str, str] = {
    "k": "density",
    "p": "density",
    "tau": "t",
    "weights": "weight",
    "signs": "weight",
    "scaling": "lambda",
    "eps": "collinear",
}
"""What the built-in methods' calls call a parameter -> what recipes call it."""


def recipe_parameters(
    method: MergeMethod, count: int, given: Mapping[str, Any]
) -> tuple[tuple[str, Any], ...]:
    """A call's keywords as the parameters of an `Apply` node: hashable, checked.

    A method with words of its own for calls (`ties`: k, weights, scaling) has those translated,
    defaults included; the recipe's words are taken too. `count` is the number of models, without
    a base that the method takes apart.

    Raises
        ParameterError: an unknown keyword, a value of the wrong type or out of range, one value
            too many or too few, two words for one parameter, none for one without a default.
    """
    called, direct = _sorted_out(method, given)
    for word in called:
        if CALL_WORDS.get(word) in direct:
            raise ParameterError(
                f"{method.name} was given {word}= and {CALL_WORDS[word]}=, which mean the same.",
                fix=f"leave {CALL_WORDS[word]}= out",
            )
    for word, value in called.items():
        if isinstance(value, list) and len(value) != count:
            raise _wrong_count(method, word, value, count)
    translated = _translated(method, count, called)
    merged = {**translated, **direct}
    for declared in method.parameters.values():
        if declared.default is REQUIRED and declared.name not in merged:
            raise ParameterError(
                f"{method.name} needs {declared.keyword!r}.",
                fix=f"{method.name}([...], {declared.keyword}=...)",
            )
    return tuple((n, _checked(method, n, v, count, called)) for n, v in merged.items())


def _translated(method: MergeMethod, count: int, called: Mapping[str, Any]) -> dict[str, Any]:
    """Raises ParameterError: the call form can't use the values."""
    if method.from_call is None:
        return {}
    try:
        return method.from_call(count, **called)
    except (TypeError, ValueError, ArithmeticError) as error:
        given = ", ".join(f"{word}={value!r:.60}" for word, value in called.items())
        words = list(inspect.signature(method.from_call).parameters.values())[1:]
        raise ParameterError(
            f"{method.name} can't use {given}.",
            f"{type(error).__name__}: {error}",
            fix=f"{method.name}([...], {', '.join(map(str, words))})",
        ) from None


def call_words(method: MergeMethod) -> list[str]:
    """The keywords that a method's call form has instead of the recipe's."""
    return list(inspect.signature(method.from_call).parameters)[1:] if method.from_call else []


def _sorted_out(
    method: MergeMethod, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(words of the call form, parameters of the recipe)."""
    words = call_words(method)
    spellings = {p.keyword: p.name for p in method.parameters.values()}
    called: dict[str, Any] = {}
    direct: dict[str, Any] = {}
    for name, value in given.items():
        if name in words:
            called[name] = _plain(value)
        elif name in spellings or name in method.parameters or method.accepts_any:
            direct[spellings.get(name, name)] = _plain(value)
        elif not method.drops_unknown:
            raise _unknown(method, name, list(dict.fromkeys([*words, *spellings])))
    return called, direct


def _plain(value: Any) -> Any:
    """Sequences of numbers as lists, whatever they came in."""
    if isinstance(value, np.ndarray | Tensor) and value.ndim == 1:
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _checked(
    method: MergeMethod, name: str, value: Any, count: int, called: Mapping[str, Any]
) -> Any:
    declared = method.parameters.get(name)
    if declared is None:
        return _frozen(value)
    if declared.per_model and isinstance(value, list):
        if len(value) != count:
            raise _wrong_count(method, name, value, count)
        values = value
    else:
        values = [value]
    for one in values:
        if one is not None and not isinstance(one, Gradient | Filtered | Fallback):
            try:
                checked = declared.check(one, method.name)
                if method.builtin and not in_float32(checked):
                    raise too_large(method.name, name, checked)
            except ParameterError as error:
                raise ParameterError(
                    error.headline, *error.facts, *_origin(name, called), fix=error.fix
                ) from None
    return _frozen(value)


def _origin(name: str, called: Mapping[str, Any]) -> list[str]:
    return [f"given as {w}={v!r}" for w, v in called.items() if CALL_WORDS.get(w) == name]


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def _wrong_count(method: MergeMethod, name: str, value: list[Any], count: int) -> ParameterError:
    models = "1 model" if count == 1 else f"{count} models"
    besides = ", the base not counted" if method.takes_base else ""
    return ParameterError(
        f"{method.name}: {name} has {len(value)} values for {models}{besides}.",
        fix=f"one value for each of the {models}, or a single one for all",
    )


def _unknown(method: MergeMethod, name: str, known: list[str]) -> ParameterError:
    options = [option.name for option in fields(CallOptions)]
    near = difflib.get_close_matches(name, [*known, *options], 1, cutoff=0.5)
    return ParameterError(
        f"{method.name} has no parameter {name!r}.",
        f"it has: {', '.join(known) or 'none'}",
        f"every call has: {', '.join(options)}",
        fix=f"write '{near[0]}='" if near else f"leave {name}= out",
    )
