"""What a recipe says that fits nothing in the models' files: a warning, with --strict an error."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from distmerge.errors import RecipeError, shown
from distmerge.expressions.compiler import Compiler, passes
from distmerge.expressions.nodes import Apply, Expression, walk
from distmerge.expressions.request import MergeRequest


def with_idle(request: MergeRequest, compiler: Compiler) -> MergeRequest:
    """The request with warnings of filters and heads that fit no tensor.

    compiler: with a program for every key.

    Raises
        RecipeError: there are such, or others that the request knows of, and it is strict.
    """
    inputs = compiler.inputs
    own = (name for names in inputs.own_keys or () for name in names.values())
    keys = dict.fromkeys([*inputs.keys, *own])
    said = (*compiler.parameters.filters.idle(keys), *_idle_heads(request.root, keys))
    found = tuple(map(shown, said))
    idle = (*request.without_effect, *found)
    if request.strict and idle:
        raise RecipeError(
            "The recipe says what has no effect on these models.",
            *dict.fromkeys(idle),
            fix="correct it, or leave --strict out",
        )
    return replace(request, warnings=(*request.warnings, *found), without_effect=idle)


def _idle_heads(root: Expression, keys: Collection[str]) -> Iterator[str]:
    """A sentence for each entry of a `passthrough` that fits no key."""
    heads = {head for node in walk(root) if isinstance(node, Apply) for head in node.passthrough}
    for head in sorted(heads):
        if not any(passes(key, frozenset([head])) for key in keys):
            yield f"passthrough: no tensor is called {head!r}, and none lies below it."
