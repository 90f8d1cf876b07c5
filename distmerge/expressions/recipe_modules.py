"""Which tensors a module of a recipe means, read off the names in the files.

mergekit's modules are called as its tables of architectures call them. Here a name is a part of
the tensors' names, or another word for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distmerge.errors import RecipeError
from distmerge.expressions.layers import comes_before
from distmerge.expressions.recipe_text import Document

_SAME = (
    ("text_decoder", "language_model", "text_model", "text", "llm", "decoder"),
    ("vision_tower", "vision_model", "vision_encoder", "visual", "vision"),
    ("audio_tower", "audio_encoder", "audio_model", "audio"),
    ("multi_modal_projector", "mm_projector", "projector", "connector"),
    ("encoder", "text_encoder"),
)
"""Words for one thing."""
REST = "default"
"""The module that takes what no other one does."""
_DEEPEST = 4


def prefixes_of(
    names: Sequence[str], keys: Iterable[str], document: Document
) -> list[tuple[str, ...]]:
    """For each module, how the keys begin that belong to it.

    Small tensors beside the modules, such as a shared embedding or a head, belong to the first
    module if they come before the layers, else to the one of the language model.

    Raises
        RecipeError: no tensor is in a module; a tensor is in none.
    """
    keys = list(keys)
    paths = dict.fromkeys(
        ".".join(parts[:depth])
        for key in keys
        for parts in [key.split(".")]
        for depth in range(1, min(len(parts), _DEEPEST + 1))
    )
    found = [list(_find(name, list(paths), document)) for name in names]
    rest = [key for key in keys if not any(key.startswith(tuple(one)) for one in found)]
    beside = [key for key in rest if key.count(".") <= 1]
    for key in beside:
        begin = key.rpartition(".")[0] + "." if "." in key else key
        found[0 if comes_before(key, "-") else _language(names)].append(begin)
    lost = [key for key in rest if key not in beside]
    if lost:
        raise RecipeError(
            f"{document.where(('modules',))}: {len(lost)} tensors are in none of the modules.",
            f"such as {lost[0]}",
            f"the modules are {', '.join(names)}",
            fix=f"add a module '{REST}:' for what is in no other one",
        )
    return [tuple(dict.fromkeys(one)) for one in found]


def _find(name: str, paths: Sequence[str], document: Document) -> Iterable[str]:
    if name == REST:
        return [""]
    words = next((same for same in _SAME if name in same), (name,))
    for word in (name, *words):
        fitting = [p for p in paths if p == word or p.endswith(f".{word}")]
        if fitting:
            depth = min(path.count(".") for path in fitting)
            return [f"{path}." for path in fitting if path.count(".") == depth]
    tops = dict.fromkeys(path for path in paths if path.count(".") <= 1)
    raise RecipeError(
        f"{document.where(('modules', name))}: no tensor's name has a part {name!r}.",
        f"there are {', '.join(list(tops)[:12])}",
        fix=f"name modules as the files do, or '{REST}' for the rest",
    )


def _language(names: Sequence[str]) -> int:
    places = [i for i, name in enumerate(names) if name in _SAME[0]]
    return places[0] if places else len(names) - 1
