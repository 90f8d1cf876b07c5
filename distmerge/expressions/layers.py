"""Between the layers of one model and those of another: families of numbered keys, and moves.

Everything is read off the names, `prefix.N.`, and off what a config says of their number; no
architecture is known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from distmerge.methods.parameters import Layers, layer_of

COUNT_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configs call the number of layers of a model that has one family of them."""
_BEFORE = re.compile(
    r"(?!embed_out)(.*emb.*|wte|wpe|shared|project_in|conv\w*|patch\w*|.*vis(ion|ual).*|.*image.*"
    r"|.*audio.*|.*tower.*|.*projector.*|feature_\w+)"
)
"""What embeddings are called, and the towers whose output the layers take as input."""


@dataclass(frozen=True, slots=True)
class Move:
    """Layers `start` to `stop` of a family are read as those from `first` on."""

    family: str
    start: int
    stop: int
    first: int

    def outer(self, key: str) -> str | None:
        """What the key of the model is outside; None for a layer that is left out."""
        return self._moved(key, self.start, self.first)

    def inner(self, key: str) -> str | None:
        """What a key outside is in the model; None for a layer that comes from elsewhere."""
        return self._moved(key, self.first, self.start)

    def _moved(self, key: str, here: int, there: int) -> str | None:
        found = layer_of(key)
        if found is None or found[0] != self.family:
            return key
        offset = found[1] - here
        if not 0 <= offset < self.stop - self.start:
            return None
        begin = f"{self.family}." if self.family else ""
        rest = key.removeprefix(begin).partition(".")[2]
        return f"{begin}{there + offset}.{rest}"


Path = tuple[Move, ...]
"""The moves between an expression's keys and those of one of its leaves, the outermost first."""


def outer_key(path: Path, key: str) -> str | None:
    """What a leaf's key is called outside; None if it can't be reached from there."""
    found: str | None = key
    for move in reversed(path):
        found = None if found is None else move.outer(found)
    return found


def comes_before(key: str, family: str) -> bool:
    """Does a key that is in none of the family's layers come before them, as embeddings do?

    Judged by the first segment in which the key parts from the family: `model.embed_tokens` and
    `model.vision_tower` come before `model.layers`, `model.norm` and `lm_head` after.
    """
    path = family.split(".")
    for i, segment in enumerate(key.split(".")):
        if i >= len(path) or segment != path[i]:
            return _BEFORE.fullmatch(segment) is not None
    return True


def in_layer_order(keys: Iterable[str]) -> list[str]:
    """The keys in their order, but each family's layers together, by number, where the first of
    them stands."""
    places: dict[str, tuple[int, int]] = {}
    firsts: dict[str, int] = {}
    for i, key in enumerate(keys):
        found = layer_of(key)
        places[key] = (i, 0) if found is None else (firsts.setdefault(found[0], i), found[1])
    return sorted(places, key=lambda key: places[key])


def counted_in(config: Mapping[str, Any] | None) -> int | None:
    """The number of layers that a config names, its language model's if it has parts."""
    for part in (config or {}, (config or {}).get("text_config")):
        if isinstance(part, Mapping):
            for field in COUNT_FIELDS:
                if isinstance(part.get(field), int):
                    return int(part[field])
    return None


def main_families(keys: Iterable[str], config: Mapping[str, Any] | None) -> list[tuple[str, int]]:
    """What a recipe's layer numbers can mean, with how many layers it has: the families that have
    as many as the config says, else all."""
    counts = Layers.of(keys).counts
    wanted = counted_in(config)
    return [pair for pair in counts.items() if pair[1] == wanted] or list(counts.items())
