"""Keys of a recipe that says `merge:`, by the rules of all recipes."""

from __future__ import annotations

from collections.abc import Collection

from distmerge.errors import RecipeError
from distmerge.expressions.recipe_keys import (
    FOR_SWEEPS,
    Ignored,
    check_reference,
    nearest_key,
    tokenizer_keys,
    unless_set,
)
from distmerge.expressions.recipe_text import Document
from distmerge.expressions.recipe_words import FORMULA_KEYS, NOT_WITH_FORMULAS, SWEPT


def check_formula_keys(document: Document, used: Collection[str]) -> list[Ignored]:
    """Every key without effect of a recipe that says `merge:`, models that it doesn't use too.

    Raises
        RecipeError: a key that would say again what is merged; one given by `--set` that has no
            effect.
    """
    data, found = document.data, []
    for key in data:
        where = document.where((key,))
        if key in NOT_WITH_FORMULAS and data[key]:
            fix = NOT_WITH_FORMULAS[key]
            raise RecipeError(f"{where}: {key!r} doesn't go with 'merge:'.", fix=fix)
        if key not in FORMULA_KEYS and key not in NOT_WITH_FORMULAS:
            fix = FOR_SWEEPS if key in SWEPT else nearest_key(key, FORMULA_KEYS)
            found.append(Ignored((key,), f"{where}: {key!r} is ignored here; {fix}.", fix))
    found += tokenizer_keys(document)
    models = data.get("models")
    for name, given in models.items() if isinstance(models, dict) else ():
        found += check_reference(document, ("models", name), given, None)
        if name not in used:
            text = f"{document.where(('models', name))}: the formula doesn't use {name!r}."
            found.append(Ignored(("models", name), text, "leave it out"))
    return unless_set(document, found)
