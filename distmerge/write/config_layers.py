"""The boundary between layers that were put together anew and a config that counts and describes
them.

A config says how many layers there are and, in lists, what each is like: its kind of attention,
its window. In the output each entry is that of the layer that was written, from the config of the
model that it came from.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_DECODER = ("decoder_layers", "num_decoder_layers")
_LIMITS = ("max_window_layers",)
"""Numbers of layers that are as many as there are, or some of the first."""
_INDICES = re.compile(r"(?!num_)\w*(_layers|_indices|_indexes|_idxs|_ids)")
"""Lists of layers, by their numbers."""
_OF_NO_LAYER = re.compile(r"architectures|\w*_token_ids?|languages?|id2label|label2id")
"""Lists of which a length like the number of layers says nothing."""
_TOWERS = ("vision", "audio")


@dataclass(frozen=True)
class Origin:
    """Where a layer of the output came from."""

    config: Mapping[str, Any] | None
    """Of the model."""
    layer: int
    """Its number there."""


def edit_layers(
    config: Mapping[str, Any], family: str, origins: Sequence[Origin]
) -> dict[str, Any]:
    """The config as it holds for these layers; the one given is left alone.

    Args
        family: how the layers' names begin, as in `model.layers`.
        origins: for each layer of the output, where it came from.
    """
    edited = copy.deepcopy(dict(config))
    path = _section(config, family)
    if path is None:
        return edited
    section = _at(edited, path)
    old = _count(section, family)
    for field, value in list(section.items()):
        if _OF_NO_LAYER.fullmatch(field):
            continue
        if isinstance(value, list) and value:
            section[field] = _listed(field, value, old, path, family, origins)
        elif field in _fields(section, family) and value == old:
            section[field] = len(origins)
        elif field in _LIMITS and isinstance(value, int):
            section[field] = len(origins) if value >= old else min(value, len(origins))
    return edited


def _listed(
    field: str,
    value: list[Any],
    old: int,
    path: tuple[str, ...],
    family: str,
    origins: Sequence[Origin],
) -> list[Any]:
    """A list with an entry for each layer, or of layers' numbers, as it holds for the output."""
    if len(value) == old:
        return [_entry(field, value, path, family, origin) for origin in origins]
    numbers = all(type(item) is int for item in value) and len(set(value)) == len(value)
    if numbers and _INDICES.fullmatch(field) and max(value) < old:
        return [
            n
            for n, origin in enumerate(origins)
            if origin.layer in (_own(field, path, origin) or value)
        ]
    return value


def _entry(field: str, value: list[Any], path: tuple[str, ...], family: str, origin: Origin) -> Any:
    """What the layer's own model says of it, else the donor of its layer of that number."""
    own = _own(field, path, origin)
    held = _at(origin.config or {}, path)
    if own and len(own) == _count(held, family) and origin.layer < len(own):
        return own[origin.layer]
    return value[min(origin.layer, len(value) - 1)]


def _own(field: str, path: tuple[str, ...], origin: Origin) -> list[Any] | None:
    found = _at(origin.config or {}, path).get(field)
    return found if isinstance(found, list) else None


def _section(config: Mapping[str, Any], family: str) -> tuple[str, ...] | None:
    """Which part of the config speaks of the family's layers."""
    found = [path for path in _paths(config, ()) if _count(_at(config, path), family)]
    tower = next((word for word in _TOWERS if word in family or word[:3] in family), None)
    for path in found:
        named = next((word for word in _TOWERS if any(word in part for part in path)), None)
        if named == tower and (path or len(found) == 1 or tower is None):
            return path
    return found[0] if found and tower is None else None


def _paths(config: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The sections of a config, nested ones first."""
    for name, part in config.items():
        if isinstance(part, Mapping):
            yield from _paths(part, (*above, name))
    yield above


def _at(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = config
    for step in path:
        found = found.get(step) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _fields(section: Mapping[str, Any], family: str) -> tuple[str, ...]:
    decoder = [field for field in _DECODER if field in section]
    if decoder and "decoder" in family:
        return tuple(decoder)
    return (*_COUNTS, "encoder_layers") if "encoder" in family else _COUNTS


def _count(section: Mapping[str, Any], family: str) -> int:
    """How many layers a section names; 0 if it names none."""
    found = (section.get(field) for field in _fields(section, family))
    return next((count for count in found if isinstance(count, int)), 0)
