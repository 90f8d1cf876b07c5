"""The boundary between the documents of one recipe and the merge that they describe together.

A document with a `name:` is a merge that others may list among their models; it is computed where
they need it, never written. The one without a name is what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from distmerge.errors import RecipeError
from distmerge.expressions.nodes import check_size
from distmerge.expressions.yaml_lines import KeyPath

if TYPE_CHECKING:
    from distmerge.expressions.model_ref import ModelRef
    from distmerge.expressions.recipe import Recipe

DEEPEST_DOCUMENTS = 100
"""Documents that need one another."""


def arranged(recipes: Sequence[Recipe]) -> tuple[Recipe, Mapping[str, Recipe]]:
    """What comes out, and the documents that can be named, by name.

    Raises
        RecipeError: two documents with one name or none, one that needs itself, several that
            nothing else uses, one that an adapter or a revision is asked of.
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
        _check_references(recipe, named)
    final = _final(recipes)
    _check_order(final, [], {})
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
    found: dict[str, Recipe] = {}
    pending = [recipe]
    while pending:
        new = {n: r for n, r in pending.pop().nested.items() if n not in found}
        found |= new
        pending += new.values()
    return set(found)


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


def references(recipe: Recipe) -> Iterator[tuple[KeyPath, ModelRef]]:
    """Whatever a recipe names as a model, and where."""
    for key, ref in (("base_model", recipe.base_model), ("config_from", recipe.config_from)):
        if ref is not None:
            yield (key,), ref
    for part in recipe.parts():
        for section in part.sections:
            if section.base_model is not None:
                yield (*section.path[:-1], "base_model"), section.base_model
            for place, source in zip(section.places, section.sources, strict=True):
                yield place, source.model
    for name, ref in zip(
        recipe.formula.models() if recipe.formula else (), recipe.in_formula(), strict=True
    ):
        yield ("models", name), ref


def _check_references(recipe: Recipe, named: Mapping[str, Recipe]) -> None:
    """A document has no files, so nothing that is said of files holds for it."""
    for place, ref in references(recipe):
        if ref.path in named and (ref.lora or ref.revision or ref.rename):
            lora = f"{{model: ..., lora: {ref.lora}}}"
            raise RecipeError(
                f"{recipe.document.where(place)}: {ref.path!r} is another document of this recipe, "
                f"which takes no {_said_of_files(ref)}.",
                fix=f"name the adapter with the models of {ref.path!r}, {lora}"
                if ref.lora
                else f"write {ref.path!r} alone",
            )


def _said_of_files(ref: ModelRef) -> str:
    return "adapter" if ref.lora else "revision" if ref.revision else "rename"


def _check_order(recipe: Recipe, above: Sequence[str], sizes: dict[str, int]) -> int:
    """How large the merge is with all that it needs.

    sizes: of the documents that have been looked at, by name.
    """
    if len(above) > DEEPEST_DOCUMENTS:
        raise RecipeError(
            "The documents of a recipe are nested too deeply.",
            f"{DEEPEST_DOCUMENTS} within one another are the most",
            fix="merge one of them first, and name the result as a model",
        )
    for name, inner in recipe.nested.items():
        if name in above:
            raise RecipeError(
                f"{recipe.document.where(('name',))}: {name!r} needs itself.",
                " -> ".join([*above, name]),
                fix="name another model there",
            )
        if name not in sizes:
            sizes[name] = _check_order(inner, [*above, name], sizes)
    size = 1 + sum(sizes.get(path, 1) for path in _uses(recipe))
    check_size(size, f"{recipe.document.origin}: the merge")
    return size


def _uses(recipe: Recipe) -> Iterator[str]:
    """The names of models, as often as they are used."""
    if recipe.formula is not None:
        meant = dict(zip(recipe.formula.models(), recipe.in_formula(), strict=True))
        yield from (meant[name].path for name in recipe.formula.uses())
    else:
        yield from (ref.path for _, ref in references(recipe))
