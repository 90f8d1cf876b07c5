"""The boundary between the documents of one recipe and the merge that they describe together.

A document with a `name:` is a merge that others may list among their models; it is computed where
they need it, never written. The one without a name is what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from distmerge.errors import RecipeError

if TYPE_CHECKING:
    from distmerge.expressions.recipe import Recipe


def arranged(recipes: Sequence[Recipe]) -> tuple[Recipe, Mapping[str, Recipe]]:
    """What comes out, and the documents that can be named, by name.

    Raises
        RecipeError: two documents with one name or none, one that needs itself, several that
            nothing else uses.
    """
    if len(recipes) == 1:
        return recipes[0], {}
    named: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name is not None and named.setdefault(recipe.name, recipe) is not recipe:
            raise RecipeError(
                f"{recipe.document.where(('name',))}: two documents are called {recipe.name!r}.",
                fix="give each a name of its own",
            )
    for recipe in recipes:
        recipe.may_name(named)
    final = _final(recipes)
    _check_order(final, [])
    return final, named


def unused(final: Recipe, named: Mapping[str, Recipe]) -> list[str]:
    """A sentence for each document that nothing uses."""
    used = _used(final)
    return [
        f"{recipe.document.where(('name',))}: nothing uses {name!r}, so it is not merged."
        for name, recipe in named.items()
        if name not in used and recipe is not final
    ]


def _used(recipe: Recipe) -> set[str]:
    return set(recipe.nested) | {name for r in recipe.nested.values() for name in _used(r)}


def _final(recipes: Sequence[Recipe]) -> Recipe:
    found = [recipe for recipe in recipes if recipe.name is None]
    if not found:
        named = {name for recipe in recipes for name in recipe.nested}
        found = [recipe for recipe in recipes if recipe.name not in named]
    if len(found) == 1:
        return found[0]
    wheres = [recipe.document.where(("merge_method",)) for recipe in found]
    raise RecipeError(
        "A recipe of several documents writes one merge: the one without a name.",
        *(f"{where} is one" for where in wheres),
        fix="give a 'name:' to each document but the last",
    )


def _check_order(recipe: Recipe, above: Sequence[str]) -> None:
    for name, inner in recipe.nested.items():
        if name in above:
            raise RecipeError(
                f"{recipe.document.where(('name',))}: {name!r} needs itself.",
                " -> ".join([*above, name]),
                fix="name another model there",
            )
        _check_order(inner, [*above, name])
