"""Between a merge method and its reader: what `help()` and `inspect.signature` say of a call.

A method's function is written for the evaluator. A call takes models instead of tensors, the
words of the call form, the recipe's, and the options of every call.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, fields
from typing import Any, TypeVar

from distmerge.expressions.call_arguments import CallOptions
from distmerge.expressions.call_parameters import CALL_WORDS, call_words
from distmerge.methods.method import MergeMethod

F = TypeVar("F", bound=Callable[..., Any])
_KINDS = inspect.Parameter
_WIDTH = 92


class SameAs:
    """Stands for the default of a keyword that says the same as another one."""

    def __init__(self, word: str) -> None:
        self.word = word

    def __repr__(self) -> str:
        return f"<{self.word}>"


def call_signature(method: MergeMethod) -> inspect.Signature:
    """What a call takes: the lists, the method's keywords, then the options of every call."""
    lists = [_KINDS(name, _KINDS.POSITIONAL_OR_KEYWORD) for name in method.inputs]
    own = [*_call_form(method), *_recipe_form(method)]
    own.sort(key=lambda parameter: parameter.kind)
    return _with_options([*lists, *own], any_keyword=method.accepts_any or method.drops_unknown)


def takes_options(function: F) -> F:
    """A function whose `**options` are those of every call: its signature and help name them."""
    declared = inspect.signature(function).parameters.values()
    own = [_KINDS(p.name, p.kind, default=p.default) for p in declared]
    named = [parameter for parameter in own if parameter.kind is not _KINDS.VAR_KEYWORD]
    setattr(function, "__signature__", _with_options(named))  # noqa: B010
    function.__doc__ = f"{inspect.getdoc(function)}\n\n{_options_doc(named)}\n"
    return function


def call_doc(method: MergeMethod) -> str:
    """What the function's author says of it, then how it is called."""
    about = inspect.getdoc(method.function) or f"Merge models by {method.name}."
    lists = ", ".join(method.inputs)
    own = [*_call_form(method), *_recipe_form(method)]
    keywords = [_line(parameter, _meaning(method, parameter)) for parameter in own]
    parts = [
        about,
        f"{method.name}({lists}, keyword=value, ...)",
        "\n".join(["Parameters", *_lists(method), *keywords]),
        _options_doc(own),
        "Returns\n" + _indented(_RETURNS),
    ]
    return "\n\n".join(parts)


_RETURNS = (
    "for names a pipeline of the base's, for pipelines another pipeline, for modules another "
    "module, for dicts a StateDict; for opened checkpoints, or models of several kinds, a "
    "LazyStateDict; with out= the written checkpoint, opened"
)


def _options(own: Iterable[inspect.Parameter]) -> list[Field[Any]]:
    """The options of every call, but for those whose name means something else here."""
    taken = {parameter.name for parameter in own}
    return [option for option in fields(CallOptions) if option.name not in taken]


def _options_doc(own: Iterable[inspect.Parameter]) -> str:
    told = [f"{o.name}={o.default!r}: {o.metadata['told']}" for o in _options(own)]
    return "\n".join(["Options of every call", *map(_indented, told)])


def _with_options(own: list[inspect.Parameter], *, any_keyword: bool = False) -> inspect.Signature:
    options = [_KINDS(o.name, _KINDS.KEYWORD_ONLY, default=o.default) for o in _options(own)]
    rest = [_KINDS("keywords", _KINDS.VAR_KEYWORD)] if any_keyword else []
    return inspect.Signature([*own, *options, *rest])


def _call_form(method: MergeMethod) -> Iterator[inspect.Parameter]:
    """The words of the call form, `k` for ties."""
    if method.from_call is not None:
        declared = inspect.signature(method.from_call).parameters
        for word in call_words(method):
            yield _KINDS(word, _KINDS.KEYWORD_ONLY, default=declared[word].default)


def _recipe_form(method: MergeMethod) -> Iterator[inspect.Parameter]:
    """The recipe's words, as far as the call form has not the very same."""
    words = call_words(method)
    same = {CALL_WORDS[word]: word for word in words if word in CALL_WORDS}
    # Calls may have defaults of their own: dare rescales by the density.
    translated = method.from_call(1) if method.from_call else {}
    in_function = inspect.signature(method.function).parameters
    for parameter in method.parameters.values():
        if parameter.keyword in words:
            continue
        default = translated.get(parameter.name, parameter.default)
        if parameter.name in same:
            default = SameAs(same[parameter.name])
        by_place = method.drops_unknown and in_function[parameter.keyword].kind
        kind = by_place or _KINDS.KEYWORD_ONLY
        yield _KINDS(parameter.keyword, kind, default=default)


def _lists(method: MergeMethod) -> Iterator[str]:
    least, most = method.models
    count = f"{least}" if least == most else f"{least} to {most}" if most else f"at least {least}"
    base = ", the base first (or at base_index)" if method.takes_base else ""
    besides = ", the base not counted" if method.takes_base and not method.counts_base else ""
    first, *others = method.inputs
    yield _indented(
        f"{first}: a list{base}; {count}{besides}. Names (paths, URLs, Hub ids), modules, "
        "pipelines, dicts of tensors or opened checkpoints"
    )
    for name in others:
        yield _indented(f"{name}: a list, one for each model: dicts of tensors, or names")


def _meaning(method: MergeMethod, parameter: inspect.Parameter) -> str:
    if isinstance(parameter.default, SameAs):
        return f"what recipes have in place of {parameter.default.word}"
    if parameter.name in call_words(method):
        return ""
    declared = {p.keyword: p for p in method.parameters.values()}.get(parameter.name)
    return "a number, or a list with one for each model" if declared and declared.per_model else ""


def _line(parameter: inspect.Parameter, meaning: str) -> str:
    shown = parameter.name
    if parameter.default is not _KINDS.empty and not isinstance(parameter.default, SameAs):
        shown += f"={parameter.default!r}"
    elif parameter.default is _KINDS.empty:
        meaning = f"required; {meaning}" if meaning else "required"
    return _indented(f"{shown}: {meaning}" if meaning else shown)


def _indented(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="    ", subsequent_indent=" " * 8)
