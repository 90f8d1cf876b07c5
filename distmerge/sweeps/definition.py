"""The boundary between SWEEP.yaml and recipes: a sweep is a recipe with a space of settings.

    sweep = load_sweep("sweep.yml")
    sweep.candidates          their names, settings and recipes; no model is looked at

The keys of the space stand beside those of the recipe, or beside `recipe: FILE`. A candidate is
the recipe with its settings given as `--set` would give them.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from distmerge.checkpoints.store import StorageOptions
from distmerge.errors import DistmergeError, RecipeError
from distmerge.expressions.recipe import Recipe, load_recipe
from distmerge.expressions.recipe_mistakes import explained
from distmerge.expressions.recipe_text import Document, Given, override, read_documents
from distmerge.expressions.recipe_words import EVALUATION_KEYS, SPACE_KEYS
from distmerge.sweeps.evaluation import Judging
from distmerge.sweeps.names import names_of
from distmerge.sweeps.space import HIDDEN, Settings, Space

EXAMPLES = {
    "combinations": "combinations: {of: [org/law, org/food, org/code], size: 2..3}",
    "size": "size: 2, or size: 2..4",
    "of": "of: [org/law, org/food, org/code]",
    "grid": "grid: {parameters.density: [0.2, 0.5], parameters.weight: [0.5, 1]}",
    "zip": "zip: {models.0.parameters.weight: [0, 1], models.1.parameters.weight: [1, 0]}",
    "list": "list: [{parameters.density: 0.2}, {parameters.density: 0.5, seed: 1}]",
    "sample": "sample: {count: 8, over: {parameters.density: {min: 0.1, max: 0.9}}}",
    "over": "over: {parameters.density: {min: 0.1, max: 0.9}, merge_method: [ties, dare_ties]}",
    "how": "how: sobol, or how: random",
    "exclude": "exclude: [{parameters.density: 0.2, parameters.weight: {max: 0.5}}]",
    "evaluate": "evaluate: judging.py:score, or evaluate: {perplexity: heldout.txt}",
    "keep": "keep: best 3 by score",
}
"""What a key of the space looks like where it is right."""
_OWN_KEYS = (*SPACE_KEYS, *EVALUATION_KEYS)
Part = TypeVar("Part", bound=BaseModel)


@dataclass(frozen=True)
class Candidate:
    """One recipe of a sweep."""

    name: str
    """A folder's name, unique in the sweep."""
    settings: Settings
    recipe: Recipe = field(repr=False)


@dataclass(frozen=True)
class Sweep:
    """A validated SWEEP.yaml."""

    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...] = ()
    judging: Judging = field(default_factory=Judging)


def load_sweep(
    source: Given,
    *,
    overrides: Sequence[str] = (),
    storage_options: StorageOptions | None = None,
    strict: bool = False,
    judging: Mapping[str, Any] | None = None,
) -> Sweep:
    """Read and validate a sweep and the recipes of all its candidates; no model is looked at.

    Arguments as for `load_recipe`; overrides change the recipe before the candidates do.
    judging: `evaluate` and `keep` that replace the file's.

    Raises
        RecipeError: no space, an empty one, a malformed one; a path that leads nowhere; a setting
            without effect on its candidate.
        UnknownMethod, ParameterError: with the candidate's name.
    """
    space, judged, documents = read_sweep(source, judging or {})
    documents = override(documents, overrides)
    settings = space.candidates()
    candidates = []
    for name, one in zip(names_of(settings), settings, strict=True):
        candidates.append(
            Candidate(name, one, candidate_recipe(name, one, space, documents, storage_options))
        )
    told = [text for one in candidates for text in one.recipe.warnings]
    warnings = tuple(dict.fromkeys(told))
    if strict and warnings:
        raise RecipeError(
            f"{documents[-1].origin} has keys without effect.",
            *warnings,
            fix="correct them, or leave --strict out",
        )
    return Sweep(tuple(candidates), warnings, judged)


def read_sweep(source: Given, judging: Mapping[str, Any]) -> tuple[Space, Judging, list[Document]]:
    """The space, how its candidates are judged, and the recipe's documents without these keys.
    Raises RecipeError."""
    documents = read_documents(source)
    holding = [d for d in documents if any(key in d.data for key in SPACE_KEYS)]
    if len(holding) != 1:
        raise (
            _no_space(documents)
            if not holding
            else RecipeError(
                f"{documents[0].origin} says in several documents what to sweep over.",
                fix=f"keep {', '.join(SPACE_KEYS)} together in one document",
            )
        )
    space = _read(Space, SPACE_KEYS, holding[0], {})
    judged = _read(Judging, EVALUATION_KEYS, holding[0], judging)
    plain = [_without_space(document) for document in documents]
    named = plain[documents.index(holding[0])]
    if "recipe" not in named.data:
        return space, judged, plain
    return space, judged, _referred(named, source)


def setting_text(path: str, value: Any) -> str:
    """A setting as `--set` takes it: one line of YAML."""
    # Escaped: PyYAML writes some line breaks of Unicode as they are, and reads them as spaces.
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=False)
    return f"{path}={text.strip().removesuffix('...').strip()}"


def candidate_recipe(
    name: str,
    settings: Settings,
    space: Space,
    documents: Sequence[Document],
    storage_options: StorageOptions | None,
) -> Recipe:
    """The recipe with a candidate's settings, which the space sets. Raises what `load_recipe`
    does, with the candidate's name."""
    # Whole sections first: a list of models before the weight of one of them.
    paths = sorted(settings, key=lambda path: path.count("."))
    try:
        given = [setting_text(path, settings[path]) for path in paths]
        changed = override(documents, given, space.spelling)
        return load_recipe(changed, storage_options=storage_options)
    except DistmergeError as error:
        raise of_candidate(error, name) from None


def of_candidate(error: DistmergeError, name: str) -> DistmergeError:
    """The error, with whose it is."""
    return type(error)(error.headline, *error.facts, f"in the candidate {name}", fix=error.fix)


def _read(
    kind: type[Part], keys: Sequence[str], document: Document, more: Mapping[str, Any]
) -> Part:
    given = {key: document.data[key] for key in keys if key in document.data} | dict(more)
    try:
        return kind.model_validate({k: v for k, v in given.items() if v is not None})
    except ValidationError as error:
        raise explained(error, document, examples=EXAMPLES, hidden=HIDDEN) from None


def _without_space(document: Document) -> Document:
    data = {key: value for key, value in document.data.items() if key not in _OWN_KEYS}
    return replace(document, data=data, text=None)


def _referred(document: Document, source: Given) -> list[Document]:
    """The documents of the file that `recipe:` names, beside the sweep's own file."""
    reference = document.data["recipe"]
    others = [key for key in document.data if key != "recipe"]
    if others:
        raise RecipeError(
            f"{document.where((others[0],))}: {others[0]!r} stands beside 'recipe:'.",
            fix="move it into that recipe, or write the whole recipe here",
        )
    if isinstance(reference, Mapping):
        return [replace(d, text=None) for d in read_documents(reference)]
    if not isinstance(reference, str):
        raise RecipeError(
            f"{document.where(('recipe',))}: 'recipe' names a file, or is a recipe itself.",
            fix="recipe: merge.yml",
        )
    place = Path(os.path.expanduser(reference))
    is_file = isinstance(source, str | os.PathLike) and os.path.isfile(os.path.expanduser(source))
    if is_file and not place.is_absolute():
        place = Path(os.path.expanduser(source)).parent / place  # type: ignore[arg-type]
    return [replace(d, text=None) for d in read_documents(place)]


def _no_space(documents: Sequence[Document]) -> RecipeError:
    keys = [key for document in documents for key in document.data]
    near = [(k, m[0]) for k in keys if (m := difflib.get_close_matches(k, SPACE_KEYS, 1, 0.7))]
    facts = [f"{key!r} is no key of a sweep; {meant!r} is" for key, meant in near]
    return RecipeError(
        f"{documents[0].origin} doesn't say what to sweep over.",
        *facts,
        f"one of {', '.join(SPACE_KEYS[:-1])} does",
        fix=EXAMPLES["grid"],
    )
