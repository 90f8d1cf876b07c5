"""Names of candidates: folders of the output, readable, and the same tomorrow.

    density=0.2,weight=0.5     law+food,ties,density=0.2

A name depends on the candidate's own settings and on which paths the sweep sets, never on how many
values they have or where the candidate stands. Two that would read alike get a hash each.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any

from distmerge.credentials import redact

LONGEST = 100
"""Characters: file systems allow 255, and a shard's name comes behind."""
BARE = ("models", "merge_method", "base_model")
"""Paths whose values say enough by themselves."""


def names_of(candidates: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each candidate's settings, no two alike on any file system."""
    labels = short_paths(path for settings in candidates for path in settings)
    readable = [_name(settings, labels) for settings in candidates]
    seen = Counter(name.casefold() for name in readable)
    return [
        name if seen[name.casefold()] == 1 and len(name) <= LONGEST else _hashed(name, settings)
        for name, settings in zip(readable, candidates, strict=True)
    ]


def short_paths(paths: Iterable[str]) -> dict[str, str]:
    """For each path the shortest end of it that no other has; without numbers at the beginning."""
    parts = {p: [part for part in p.split(".") if part != "parameters"] or [p] for p in paths}
    found = {}
    for path, steps in parts.items():
        others = [other for name, other in parts.items() if name != path]
        for length in range(1, len(steps) + 1):
            end = steps[-length:]
            if not end[0].isdecimal() and all(other[-length:] != end for other in others):
                break
        found[path] = _slug(".".join(end))
    return found


def _name(settings: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    pieces = [
        label(value) if path in BARE else f"{labels[path]}={label(value)}"
        for path, value in settings.items()
    ]
    return ",".join(piece for piece in pieces if piece).lstrip(".") or "as-it-is"


def label(value: Any) -> str:
    """A value in characters that every file system and shell takes as they are."""
    if isinstance(value, dict):
        inside = value.get("model", value.get("path"))
        return label(inside) if inside is not None else "+".join(map(label, value.values()))
    if isinstance(value, list):
        return "+".join(map(label, value))
    if isinstance(value, str):
        return _slug(redact(value).rstrip("/").rpartition("/")[2])
    return _slug(str(value)) if isinstance(value, date) else json.dumps(value)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", text).strip("-")


def _hashed(name: str, settings: Mapping[str, Any]) -> str:
    spelled = json.dumps(settings, sort_keys=True, default=str)
    return f"{name[: LONGEST - 9]}-{hashlib.blake2b(spelled.encode(), digest_size=4).hexdigest()}"
