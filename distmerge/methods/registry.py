"""Where merge methods are found by name: built in, in installed packages, in the user's files."""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from distmerge.errors import UnknownMethod
from distmerge.methods.method import MergeMethod
from distmerge.methods.signature import describe

_BUILTIN_MODULES = (
    *("linear", "spherical", "stock", "swaps", "agents"),
    *("task_vectors", "della", "sce", "examples", "fisher", "padding"),
)


@functools.cache
def _builtin() -> dict[str, MergeMethod]:
    modules = [importlib.import_module(f"distmerge.methods.{m}") for m in _BUILTIN_MODULES]
    found = [v for m in modules for v in vars(m).values() if isinstance(v, MergeMethod)]
    return {method.name: method for method in found if method.builtin}


def method_names() -> Iterator[str]:
    """Built-in methods and those of installed packages (entry points in `distmerge.methods`)."""
    yield from sorted(name for name in _builtin() if not name.startswith("_"))
    yield from sorted(e.name for e in entry_points(group="distmerge.methods"))


def find_method(name: str) -> MergeMethod:
    """A method by name: built in, from an installed package, or `module.py:function`.

    Raises
        UnknownMethod: with the nearest name.
    """
    if not isinstance(name, str):
        raise UnknownMethod(
            f"A merge method is called by its name, not by a {type(name).__name__}.",
            fix="'distmerge methods' lists them",
        )
    if name in _builtin():
        return _builtin()[name]
    for entry in entry_points(group="distmerge.methods"):
        if entry.name == name:
            return _as_method(entry.load(), name)
    if ":" in name:
        from distmerge.methods.user_code import load_function

        return _as_method(load_function(name), name)
    near = difflib.get_close_matches(name, list(method_names()), 1, cutoff=0.4)
    raise UnknownMethod(
        f"There is no merge method {name!r}.",
        f"known: {', '.join(method_names())}",
        fix=f"did you mean '{near[0]}'?" if near else "'distmerge methods' lists them",
    )


def _as_method(found: Any, name: str) -> MergeMethod:
    if isinstance(found, MergeMethod):
        return found
    from distmerge.methods.declare import ModelMethod  # declared in terms of this module

    if isinstance(found, ModelMethod):
        raise UnknownMethod(
            f"{name!r} sees whole models, so it can be called but not streamed.",
            fix="decorate a function of one layer's tensors with @layer_merge",
        )
    if callable(found):
        return describe(found)
    raise UnknownMethod(
        f"{name!r} is a {type(found).__name__}, not a function.",
        fix="decorate one with @layer_merge",
    )
