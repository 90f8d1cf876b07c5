"""The boundary between a recipe as somebody gave it and plain data that knows its lines.

A recipe comes as a file, standard input, text or a mapping, with overrides to be applied. What
its keys mean is not decided here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from distmerge.credentials import redact
from distmerge.errors import RecipeError
from distmerge.expressions.recipe_files import (
    LARGEST_RECIPE,
    file_text,
    is_text,
    standard_input,
)
from distmerge.expressions.yaml_lines import (
    DEEPEST,
    KeyPath,
    kind_of,
    read_yaml,
    read_yaml_documents,
)


@dataclass(frozen=True)
class Document:
    """A recipe's data and where each piece of it stands."""

    data: dict[str, Any] = field(repr=False, default_factory=dict)
    origin: str = "recipe"
    """The file's name, or what stands for it in messages."""
    lines: Mapping[KeyPath, int] = field(repr=False, default_factory=dict)
    """One-based; empty for a recipe given as a dict."""
    text: str | None = field(repr=False, default=None)
    """As it was written, if it was."""
    overridden: Mapping[KeyPath, str] = field(default_factory=dict)
    """How their author gave values that stand in no file: `--set seed`."""
    warnings: tuple[str, ...] = ()

    def where(self, path: KeyPath) -> str:
        """`recipe.yml, line 7`, or the nearest that is known."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.overridden:
                return self.overridden[path[:end]]
            below = next((p for p in self.overridden if p[:end] == path[:end]), None)
            if below is not None and path[:end] not in self.lines:
                return self.overridden[below]
            if path[:end] in self.lines:
                return f"{self.origin}, line {self.lines[path[:end]]}"
        return f"{self.origin}, {dotted(path)}" if path and not self.lines else self.origin


def dotted(path: KeyPath) -> str:
    """A path as `--set` takes it: `models.0.parameters.weight`."""
    return ".".join(map(str, path))


Given = str | os.PathLike[str] | Mapping[str, Any]


def read_documents(
    source: Given | Sequence[Mapping[str, Any]] | Sequence[Document],
) -> list[Document]:
    """A recipe's documents from a file, from standard input ("-"), from YAML text, from a mapping
    or from several.

    A string that holds a line break or a colon and names no file is YAML text.

    Raises
        RecipeError: not there, too large, not YAML (with line and column), not a mapping.
    """
    if isinstance(source, Mapping):
        return [Document(_plain(source, ()), origin="the recipe")]
    if isinstance(source, list | tuple) and source:
        return [_document(one, n) for n, one in enumerate(source, 1)]
    if source == "-":
        return parse_documents(standard_input(), "standard input")
    if not isinstance(source, str | os.PathLike):
        raise _no_recipe("A recipe", source)
    if isinstance(source, str) and is_text(source):
        return parse_documents(source, "the recipe")
    return parse_documents(file_text(os.fspath(source)), redact(os.fspath(source)))


def _document(given: Any, number: int) -> Document:
    """One of several."""
    if isinstance(given, Document):
        return given
    if not isinstance(given, Mapping):
        raise _no_recipe(f"Document {number} of the recipe", given)
    return Document(_plain(given, ()), f"document {number} of the recipe")


def _no_recipe(called: str, given: Any) -> RecipeError:
    held = kind_of(given) if isinstance(given, list) else f"a {type(given).__name__}"
    return RecipeError(
        f"{called} is a file, YAML text or a mapping, not {held}.",
        fix="give a path like 'merge.yml', or {'merge_method': 'linear', 'models': [...]}",
    )


def parse_documents(text: str, origin: str) -> list[Document]:
    """YAML text as data with lines. Raises RecipeError."""
    if len(text) > LARGEST_RECIPE:
        raise RecipeError(
            f"{origin} is too large for a recipe.",
            f"it has more than {LARGEST_RECIPE:,} characters",
            fix="give the recipe, not the weights",
        )
    documents = []
    for found in read_yaml_documents(text, origin):
        if not isinstance(found.data, dict):
            held = kind_of(found.data)
            raise RecipeError(
                f"{origin} holds {held}, and a recipe is a mapping of keys to values.",
                fix="begin with 'merge_method: linear'",
            )
        warnings = tuple(found.warnings)
        documents.append(Document(found.data, origin, found.lines, text, warnings=warnings))
    return documents


def at_path(data: Any, path: KeyPath) -> Any:
    """What stands at a place; None if nothing does."""
    for step in path:
        if isinstance(data, list) and isinstance(step, int) and step < len(data):
            data = data[step]
        elif isinstance(data, dict):
            data = data.get(str(step))
        else:
            return None
    return data


Spelling = Callable[[str], str]
"""What messages call a path, as its author gave it."""


def by_option(path: str) -> str:
    """It was given on the command line."""
    return f"--set {path}"


def override(
    documents: Sequence[Document], overrides: Sequence[str], spelling: Spelling = by_option
) -> list[Document]:
    """The documents with `a.b=1` and the like applied: to the one whose name comes first in the
    path, else to the one without a name, else to the last. Raises what `apply_overrides` does.
    """
    found = list(documents)
    if len(found) == 1:
        return [apply_overrides(found[0], overrides, spelling)]
    names = [document.data.get("name") for document in found]
    last = names.index(None) if None in names else len(names) - 1
    for one in overrides:
        head, _, rest = one.partition(".")
        named = head in names
        at = names.index(head) if named else last
        told = spelling(one.partition("=")[0])
        found[at] = apply_overrides(found[at], [rest if named else one], _always(told))
    return found


def _always(told: str) -> Spelling:
    return lambda path: told


def apply_overrides(
    document: Document, overrides: Sequence[str], spelling: Spelling = by_option
) -> Document:
    """The document with `a.b=1` and the like applied, in order; list items go by number.

    Values are YAML. Mappings that are missing on the way are made; whether their keys mean
    anything is checked with the rest of the recipe's keys.

    Raises
        RecipeError: no `=`, a number past a list's end, a path through a plain value.
    """
    data: Any = _copy(document.data)
    paths: dict[KeyPath, str] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        steps, told = path.strip().split("."), spelling(path)
        if not equals or not all(steps):
            raise RecipeError(
                f"--set {override!r} is not of the form key=value.",
                fix="--set parameters.weight=0.4",
            )
        paths[_assign(data, steps, read_yaml(text, told).data, told)] = told
    lines = {p: n for p, n in document.lines.items() if not any(p[: len(o)] == o for o in paths)}
    return Document(
        data,
        document.origin,
        lines,
        document.text,
        {**document.overridden, **paths},
        document.warnings,
    )


def _assign(data: Any, steps: Sequence[str], value: Any, told: str) -> KeyPath:
    place, path = data, []
    for i, step in enumerate(steps):
        key = _step(place, step, told, steps[:i])
        path.append(key)
        if i == len(steps) - 1:
            place[key] = value
        elif isinstance(place, dict) and place.get(step) is None:
            place[key] = {}
        place = place[key]
    return tuple(path)


def _step(place: Any, step: str, told: str, before: Sequence[str]) -> str | int:
    if isinstance(place, dict):
        return step
    parent = ".".join(before)
    if not isinstance(place, list):
        fact = f"{parent} is {kind_of(place)}"
    elif step.isdecimal() and int(step) < len(place):
        return int(step)
    else:
        items = len(place)
        fact = f"{parent} has {items} item{'s' if items != 1 else ''}, counted from 0"
    raise RecipeError(
        f"{told} leads nowhere in this recipe.",
        fact,
        fix="models.0.parameters.weight is the first model's",
    )


def dump_text(data: Mapping[str, Any]) -> str:
    """Data as YAML, keys in their order."""
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=1000)


def _plain(value: Any, path: KeyPath) -> Any:
    """Mappings, lists, numbers, words: what YAML could have said."""
    if len(path) > DEEPEST:
        raise RecipeError(f"The recipe is nested more than {DEEPEST} levels deep.")
    if isinstance(value, Mapping):
        return {str(key): _plain(kept, (*path, str(key))) for key, kept in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(kept, (*path, i)) for i, kept in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if callable(getattr(value, "item", None)):  # a number of numpy's or torch's
        return value.item()
    raise RecipeError(
        f"{dotted(path)} is of type {type(value).__name__}, which a recipe can't hold.",
        fix="give numbers, words, lists and mappings",
    )


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(kept) for key, kept in value.items()}
    return [_copy(kept) for kept in value] if isinstance(value, list) else value
