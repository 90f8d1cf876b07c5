"""Between a function and text that changes when what it does is changed.

Its own source isn't all of it: a notebook's cell may set a number anew, or define a helper again,
and leave the cell with the method as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def source_text(function: Callable[..., Any], *, alone: bool = False) -> str:
    """The function's source; numbers and texts that it refers to; the same of functions that lie
    beside it, as far as it calls them by their names.

    Lists, dicts and tensors that it refers to aren't looked at, nor what lies in other modules.

    alone: what is in its module is known to stay as it is.
    """
    texts: list[str] = []
    pending, seen = [function], {function}
    while pending:
        one = pending.pop()
        text, names = _read(one)
        texts.append(text)
        for name, value in _referred(one, () if alone else names):
            if _is_plain(value):
                texts.append(f"{name} = {value!r}")
            elif _lies_beside(value, function) and value not in seen:
                seen.add(value)
                pending.append(value)
    return "\n".join(texts)


@functools.lru_cache(maxsize=512)
def _read(function: Callable[..., Any]) -> tuple[str, tuple[str, ...]]:
    """(source, names that it uses), which no function ever changes."""
    code = getattr(function, "__code__", None)
    names = tuple(sorted(set(_names(code)))) if code else ()
    try:
        return inspect.getsource(function), names
    except (OSError, TypeError):  # typed into an interpreter, or read from standard input
        return (_code_text(code) if code else repr(type(function))), names


def _names(code: CodeType) -> Iterator[str]:
    """Of globals and attributes, in comprehensions and inner functions too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _code_text(code: CodeType) -> str:
    """The same in every process, which a code object's own repr is not."""
    constants = [
        _code_text(one)
        if isinstance(one, CodeType)
        else repr(sorted(map(repr, one)) if isinstance(one, frozenset) else one)
        for one in code.co_consts
    ]
    return repr((code.co_code, constants, code.co_names))


def _referred(function: Callable[..., Any], names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What it closes over, its defaults, and the globals of these names, as they are now."""
    if not isinstance(function, FunctionType):
        return
    closed = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in closed:
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield "defaults", function.__defaults__
    yield from sorted((function.__kwdefaults__ or {}).items())
    known = function.__globals__
    yield from ((name, known[name]) for name in names if name in known)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _lies_beside(value: Any, function: Callable[..., Any]) -> bool:
    """Is it a function of the same script, notebook, folder or package?"""
    home = str(getattr(function, "__module__", None)).partition(".")[0]
    return isinstance(value, FunctionType) and str(value.__module__).partition(".")[0] == home
