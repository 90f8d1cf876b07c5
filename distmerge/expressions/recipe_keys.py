"""The boundary between keys that mean something, keys that will, and keys that nobody reads.

mergekit drops what it doesn't know without a word, so files in circulation hold misspelt and
misplaced keys. They run here with the same result, and each is named with its line and the place
where it should stand.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distmerge.errors import ParameterError, RecipeError
from distmerge.expressions.recipe_text import Document
from distmerge.expressions.yaml_lines import KeyPath
from distmerge.methods.method import MergeMethod, unknown_parameter
from distmerge.methods.registry import find_method, method_names


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP_KEYS = _words("""
    merge_method base_model models parameters dtype out_dtype seed over config_from
    storage_options on_missing on_unequal passthrough
""")
MODEL_KEYS = frozenset({"model", "parameters"})
REFERENCE_KEYS = frozenset({"path", "revision", "model"})
CHOICE_KEYS = frozenset({"filter", "value"})

_SOON_TOP = _words("""
    slices modules tokenizer tokenizer_source chat_template merge rename on_shape_mismatch
""")
_SOON_MODEL = frozenset({"layer_range", "lora", "override_architecture", "rename"})
_SOON_PARAMETERS: frozenset[str] = frozenset()

_LANGUAGE_PARAMETERS = _words("""
    weight density normalize rescale lambda int8_mask gamma epsilon t select_topk
    filter_wise scale max_iter tol nuslerp_row_wise nuslerp_flatten normalize_weights eps r
    alpha over residual_weight sign_weighting
""")
"""Parameters that some method of the recipe language has."""
MERGEKIT_METHODS = _words("""
    linear slerp nuslerp multislerp karcher task_arithmetic ties dare_ties dare_linear
    della della_linear breadcrumbs breadcrumbs_ties sce ram ramplus_tl model_stock nearswap
    arcee_fusion passthrough
""")
_CALL_NAMES = {
    "k": "density",
    "p": "density",
    "tau": "t",
    "weights": "weight",
    "signs": "weight",
    "scaling": "lambda",
}
"""How Python calls spell a parameter, and what recipes call it."""

_TASK_VECTOR_METHODS = _words("""
    task_arithmetic ties breadcrumbs breadcrumbs_ties dare_linear dare_ties della della_linear sce
""")
_ELSEWHERE = {
    "path": "in 'model: {path: ..., revision: ...}'",
    "revision": "in 'model: {path: ..., revision: ...}', or in 'model: name@revision'",
    "model": "in an item of 'models:'",
    "pad_to_multiple_of": "under 'tokenizer:'",
    "tokens": "under 'tokenizer:'",
    "source": "under 'tokenizer:'",
    "sources": "under 'slices:'",
    "layer_range": "under 'slices:'",
    "filter": "in an item of a parameter's list",
    "value": "in an item of a parameter's list",
}


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
            that has no effect.
        ParameterError: a parameter that no method has.
    """
    found = list(_ignored(document, method))
    for ignored in found:
        if any(_within(given, ignored.path) for given in document.overridden):
            raise RecipeError(ignored.text, fix=ignored.fix)
    return found


def refuse_soon(document: Document) -> None:
    """Refuse top-level keys that change the merge and are not implemented. Raises RecipeError."""
    for key in _SOON_TOP:
        _refuse(document, document.data, (), key)


def _ignored(document: Document, method: MergeMethod) -> Iterator[Ignored]:
    data = document.data
    yield from _check_level(document, data, (), TOP_KEYS, method)
    yield from _check_parameters(document, ("parameters",), data.get("parameters"), method)
    for key in ("base_model", "config_from"):
        yield from _check_reference(document, (key,), data.get(key), method)
    models = data.get("models")
    for i, entry in enumerate(models if isinstance(models, list) else ()):
        if not isinstance(entry, dict):
            continue
        path = ("models", i)
        for key in _SOON_MODEL:
            _refuse(document, entry, path, key)
        yield from _check_level(document, entry, path, MODEL_KEYS | {*method.inputs[1:]}, method)
        for key in ("model", *method.inputs[1:]):
            yield from _check_reference(document, (*path, key), entry.get(key), method)
        given = entry.get("parameters")
        yield from _check_parameters(document, (*path, "parameters"), given, method)


def _refuse(document: Document, data: Mapping[str, Any], path: KeyPath, key: str) -> None:
    if data.get(key) in (None, [], "") or key not in data:
        return
    raise RecipeError(
        f"{document.where((*path, key))}: {key!r} is not supported yet.",
        "without it the result would be another one than the recipe asks for",
        fix=f"leave {key!r} out if the merge doesn't need it",
    )


def _check_level(
    document: Document,
    data: Mapping[str, Any],
    path: KeyPath,
    known: frozenset[str],
    method: MergeMethod,
) -> Iterator[Ignored]:
    # Keys of the language that are empty ask for nothing; a lone recipe's name neither.
    empty = _SOON_MODEL if path else _SOON_TOP | {"name"}
    for key in data:
        if key not in known and key not in empty:
            fix = _place(key, path, known, method)
            where = document.where((*path, key))
            yield Ignored((*path, key), f"{where}: {key!r} is ignored here; {fix}.", fix)


def _place(key: str, path: KeyPath, known: frozenset[str], method: MergeMethod) -> str:
    """Where a key should stand, or what it may have been meant to be."""
    if path and key in TOP_KEYS:
        return "move it to the top level"
    if key in method.parameters or key in _LANGUAGE_PARAMETERS:
        whose = "this model's " if path[:1] == ("models",) else ""
        return f"move it under {whose}'parameters:'"
    if key in _ELSEWHERE:
        return f"write it {_ELSEWHERE[key]}"
    near = difflib.get_close_matches(key, sorted(known), 1)
    return f"write {near[0]!r}" if near else "leave it out"


def _check_reference(
    document: Document, path: KeyPath, given: Any, method: MergeMethod
) -> Iterator[Ignored]:
    """`model: {path, revision}`, perhaps with another `model:` around it."""
    if not isinstance(given, dict):
        return
    for key in _SOON_MODEL:
        _refuse(document, given, path, key)
    yield from _check_level(document, given, path, REFERENCE_KEYS, method)
    yield from _check_reference(document, (*path, "model"), given.get("model"), method)


def _check_parameters(
    document: Document, path: KeyPath, given: Any, method: MergeMethod
) -> Iterator[Ignored]:
    if not isinstance(given, dict):
        return
    for name, value in given.items():
        place = (*path, name)
        where = document.where(place)
        declared = method.parameters.get(name)
        if declared is not None and (declared.per_model or len(path) == 1):
            yield from _check_choices(document, place, value, method)
            continue
        if declared is not None:
            fix = "move it under the recipe's own 'parameters:'"
            reason = f"{where}: {method.name} has one {name!r} for all models; {fix}."
            yield Ignored(place, reason, fix)
        elif not method.accepts_any and not _without_effect(method, name, value):
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
    """A parameter of other methods has no effect; one of no method is a mistake."""
    name, where = str(place[-1]), document.where(place)
    if name in _SOON_PARAMETERS or (method.name == "ties" and name == "rescale"):
        raise RecipeError(
            f"{where}: {name!r} is not supported by {method.name} yet.", fix=f"leave {name!r} out"
        )
    if name in _LANGUAGE_PARAMETERS or name in _builtin_parameters():
        fix = f"leave {name!r} out"
        text = f"{where}: {method.name} has no parameter {name!r}; it is ignored."
        return Ignored(place, text, fix)
    if name in TOP_KEYS or name in _SOON_TOP:
        fix = "move it to the top level"
        return Ignored(place, f"{where}: {name!r} is ignored here; {fix}.", fix)
    error = unknown_parameter(method, name)
    fixed = error.fix
    if _CALL_NAMES.get(name) in method.parameters:
        fixed = f"write '{_CALL_NAMES[name]}'; {name!r} is its name in Python calls"
        fixed += ", and density = 1 - p" if name == "p" else ""
    raise ParameterError(error.headline, *error.facts, where, fix=fixed)


def _without_effect(method: MergeMethod, name: str, value: Any) -> bool:
    """Parameters that mergekit's method of this name takes and that change no result."""
    if name == "int8_mask":  # the dtype of mergekit's temporaries
        return method.name in _TASK_VECTOR_METHODS
    if method.name == "task_arithmetic":  # nothing is dropped, so nothing is rescaled
        return name in ("density", "rescale")
    return method.name == "ties" and name == "rescale" and value in (False, 0, None)


def _builtin_parameters() -> frozenset[str]:
    names = [name for name in method_names() if name.isidentifier()]
    return frozenset(p for m in map(find_method, names) if m.builtin for p in m.parameters)


def _within(given: KeyPath, path: KeyPath) -> bool:
    shorter = min(len(given), len(path))
    return given[:shorter] == path[:shorter]
