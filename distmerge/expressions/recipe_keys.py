"""The boundary between keys that mean something, keys that will, and keys that nobody reads.

mergekit drops what it doesn't know without a word, so files in circulation hold misspelt and
misplaced keys. They run here with the same result, and each is named with its line and the place
where it should stand.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distmerge.errors import ParameterError, RecipeError
from distmerge.expressions.recipe_options import means_storage_options, refuse_options
from distmerge.expressions.recipe_text import Document
from distmerge.expressions.recipe_tokenizer import unknown_keys
from distmerge.expressions.recipe_words import (
    CALL_NAMES,
    CHOICE_KEYS,
    ELSEWHERE,
    LANGUAGE_PARAMETERS,
    MODEL_KEYS,
    MODULE_KEYS,
    NEEDLESS,
    NOT_WITH_FORMULAS,
    REFERENCE_KEYS,
    SLICE_KEYS,
    SWEPT,
    TASK_VECTOR_METHODS,
    TOP_KEYS,
)
from distmerge.expressions.yaml_lines import KeyPath
from distmerge.methods.method import MergeMethod, unknown_parameter
from distmerge.methods.registry import find_method, method_names

FOR_SWEEPS = "use 'distmerge sweep'"


@dataclass(frozen=True)
class Ignored:
    """A key that has no effect, and what to do about it."""

    path: KeyPath
    text: str
    fix: str


def check_keys(document: Document, method: MergeMethod) -> list[Ignored]:
    """Every key of a recipe that has no effect with this method.

    Raises
        RecipeError: a key of the language that can't be honoured yet; one given by `--set`
            that has no effect; one that holds storage options.
        ParameterError: one given by `--set` that no method has.
    """
    return unless_set(document, _ignored(document, method))


def unless_set(document: Document, ignored: Iterable[Ignored]) -> list[Ignored]:
    """Raises RecipeError for one that was given by `--set`, or that holds storage options."""
    found = list(ignored)
    for one in found:
        refuse_options(document, one.path)
        if _is_set(document, one.path):
            raise RecipeError(one.text, fix=one.fix)
    return found


def refuse_misplaced(document: Document) -> None:
    """Refuse what would change the merge if it stood where it belongs. Raises RecipeError."""
    if document.data.get("rename"):
        raise RecipeError(
            f"{document.where(('rename',))}: rename holds for one model, not for all.",
            fix=f"write it {ELSEWHERE['rename']}",
        )


def check_forms(document: Document) -> None:
    """Refuse a recipe, or a module, that says twice what is merged. Raises RecipeError."""
    modules = document.data.get("modules")
    inside = modules if isinstance(modules, dict) else {}
    for path, data in [((), document.data), *((("modules", n), m) for n, m in inside.items())]:
        held = data if isinstance(data, dict) else {}
        given = [key for key in ("models", "slices", "modules") if held.get(key)]
        if len(given) > 1:
            raise RecipeError(
                f"{document.where((*path, given[1]))}: there are {' and '.join(given)}.",
                "each of them says all that is merged",
                fix=f"keep one of {', '.join(given)}",
            )


def _ignored(document: Document, method: MergeMethod) -> Iterator[Ignored]:
    data = document.data
    yield from _check_level(document, data, (), TOP_KEYS, method)
    for key in ("base_model", "config_from"):
        yield from check_reference(document, (key,), data.get(key), method)
    yield from _check_sections(document, data, (), method)
    yield from tokenizer_keys(document)
    modules = data.get("modules")
    for name, module in (modules if isinstance(modules, dict) else {}).items():
        if isinstance(module, dict):
            path = ("modules", name)
            yield from _check_level(document, module, path, MODULE_KEYS, method)
            yield from _check_sections(document, module, path, method)


def tokenizer_keys(document: Document) -> Iterator[Ignored]:
    """Keys under `tokenizer:` that mean nothing, and those of a model in `tokenizer_source:`."""
    source = document.data.get("tokenizer_source")
    yield from check_reference(document, ("tokenizer_source",), source, None)
    for path, fix in unknown_keys(document):
        yield Ignored(path, f"{document.where(path)}: {path[-1]!r} is ignored here; {fix}.", fix)


def _check_sections(
    document: Document, data: Mapping[str, Any], path: KeyPath, method: MergeMethod
) -> Iterator[Ignored]:
    """The parameters, models and slices of a recipe or a module."""
    given = data.get("parameters")
    yield from _check_parameters(document, (*path, "parameters"), given, method)
    yield from _check_sources(document, (*path, "models"), data.get("models"), method)
    slices = data.get("slices")
    for i, one in enumerate(slices if isinstance(slices, list) else ()):
        if isinstance(one, dict):
            at = (*path, "slices", i)
            yield from _check_level(document, one, at, SLICE_KEYS, method)
            yield from check_reference(document, (*at, "base_model"), one.get("base_model"), method)
            inside = one.get("parameters")
            yield from _check_parameters(document, (*at, "parameters"), inside, method)
            yield from _check_sources(document, (*at, "sources"), one.get("sources"), method)


def _check_sources(
    document: Document, path: KeyPath, sources: Any, method: MergeMethod
) -> Iterator[Ignored]:
    known = MODEL_KEYS | {*method.inputs[1:]}
    known |= {"layer_range"} if path[-1] == "sources" else set()
    for i, entry in enumerate(sources if isinstance(sources, list) else ()):
        if not isinstance(entry, dict):
            continue
        at = (*path, i)
        yield from _check_level(document, entry, at, known, method)
        for key in ("model", *method.inputs[1:]):
            yield from check_reference(document, (*at, key), entry.get(key), method)
        given = entry.get("parameters")
        yield from _check_parameters(document, (*at, "parameters"), given, method)


def _check_level(
    document: Document,
    data: Mapping[str, Any],
    path: KeyPath,
    known: frozenset[str],
    method: MergeMethod | None,
) -> Iterator[Ignored]:
    # Keys of the language that are empty ask for nothing.
    empty = NEEDLESS if path else frozenset({"rename"})
    empty |= {key for key in ("lora",) if not data.get(key)}
    for key in data:
        if key not in known and key not in empty:
            fix = _place(key, path, known, method)
            where = document.where((*path, key))
            yield Ignored((*path, key), f"{where}: {key!r} is ignored here; {fix}.", fix)


def _place(key: str, path: KeyPath, known: frozenset[str], method: MergeMethod | None) -> str:
    """Where a key should stand, or what it may have been meant to be."""
    if method is None and key in NOT_WITH_FORMULAS:
        return NOT_WITH_FORMULAS[key]
    if method is None and key in LANGUAGE_PARAMETERS:
        return f"write it in the formula, NAME(models=[...], {key}=...)"
    if not path and key in SWEPT:
        return FOR_SWEEPS
    if path and key in TOP_KEYS:
        return "move it to the top level"
    if key in LANGUAGE_PARAMETERS or (method is not None and key in method.parameters):
        whose = f"this {_level(path)}'s " if path else ""
        return f"move it under {whose}'parameters:'"
    if key in ELSEWHERE:
        return f"write it {ELSEWHERE[key]}"
    return nearest_key(key, known)


def nearest_key(key: str, known: frozenset[str]) -> str:
    """What to do about a key that isn't known."""
    near = difflib.get_close_matches(key, sorted(known), 1)
    return f"write {near[0]!r}" if near else "leave it out"


def _level(path: KeyPath) -> str:
    """Of what the mapping at that place speaks."""
    if len(path) > 1 and isinstance(path[-1], int):
        return "slice" if path[-2] == "slices" else "model"
    return "module" if path[:1] == ("modules",) else "recipe"


def check_reference(
    document: Document, path: KeyPath, given: Any, method: MergeMethod | None
) -> Iterator[Ignored]:
    """`model: {path, revision}`, perhaps with another `model:` around it.

    method: None in a formula's models.
    """
    if not isinstance(given, dict):
        return
    yield from _check_level(document, given, path, REFERENCE_KEYS, method)
    for key in ("model", "lora"):
        yield from check_reference(document, (*path, key), given.get(key), method)


def _check_parameters(
    document: Document, path: KeyPath, given: Any, method: MergeMethod
) -> Iterator[Ignored]:
    if not isinstance(given, dict):
        return
    for name, value in given.items():
        place = (*path, name)
        where = document.where(place)
        declared = method.parameters.get(name)
        if declared is not None and (declared.per_model or _level(path[:-1]) != "model"):
            yield from _check_choices(document, place, value, method)
            continue
        if declared is not None:
            fix = "move it under the recipe's own 'parameters:'"
            reason = f"{where}: {method.name} has one {name!r} for all models; {fix}."
            yield Ignored(place, reason, fix)
        elif means_storage_options(name):
            yield Ignored(place, f"{where}: {name!r} is ignored here.", "leave it out")
        elif not method.accepts_any and not _without_effect(method, name):
            yield _unknown(document, place, method)


def _check_choices(
    document: Document, place: KeyPath, value: Any, method: MergeMethod
) -> Iterator[Ignored]:
    """The items of a filtered value."""
    if isinstance(value, dict):
        yield from _check_level(document, value, place, CHOICE_KEYS, method)
    for i, item in enumerate(value if isinstance(value, list) else ()):
        if isinstance(item, dict):
            yield from _check_level(document, item, (*place, i), CHOICE_KEYS, method)


def _unknown(document: Document, place: KeyPath, method: MergeMethod) -> Ignored:
    """A parameter that the method doesn't have: another's, misspelt, or no parameter at all."""
    name, where = str(place[-1]), document.where(place)
    if name in LANGUAGE_PARAMETERS or name in _builtin_parameters():
        fix = f"leave {name!r} out"
        text = f"{where}: {method.name} has no parameter {name!r}; it is ignored."
        return Ignored(place, text, fix)
    if name in TOP_KEYS | ELSEWHERE.keys():
        fix = f"write it {ELSEWHERE[name]}" if name in ELSEWHERE else "move it to the top level"
        return Ignored(place, f"{where}: {name!r} is ignored here; {fix}.", fix)
    error = unknown_parameter(method, name)
    fix, meant = error.fix or "", CALL_NAMES.get(name)
    if meant in method.parameters:
        also = ", and density = 1 - p" if name == "p" else ""
        fix = f"write {meant!r} ({name!r} is its name in Python calls{also})"
    if _is_set(document, place):
        raise ParameterError(error.headline, *error.facts, where, fix=fix)
    told = f"{where}: {method.name} has no parameter {name!r}; it is ignored"
    if fix.startswith("write"):
        return Ignored(place, f"{told}. Did you mean {fix.removeprefix('write ')}?", fix)
    return Ignored(place, f"{told}; {error.facts[0]}.", fix)


def _without_effect(method: MergeMethod, name: str) -> bool:
    """Parameters that mergekit's method of this name takes and that change no result."""
    if name == "int8_mask":  # the dtype of mergekit's temporaries
        return method.name in TASK_VECTOR_METHODS
    # Nothing is dropped, so nothing is rescaled.
    return method.name == "task_arithmetic" and name in ("density", "rescale")


def _builtin_parameters() -> frozenset[str]:
    names = [name for name in method_names() if name.isidentifier()]
    return frozenset(p for m in map(find_method, names) if m.builtin for p in m.parameters)


def _is_set(document: Document, path: KeyPath) -> bool:
    """Whether it was given by `--set`."""
    return any(given[: len(path)] == path[: len(given)] for given in document.overridden)
