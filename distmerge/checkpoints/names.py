"""Between two checkpoints' spellings of one model: which tensor of one is which of the other.

Pure: sees names, shapes and configs, never a value and never an architecture's code. It follows
what `from_pretrained` accepts (a base-model prefix on one side, old spellings, wrappers, tied
copies, buffers that the code rebuilds), so that models which load alike also merge alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from distmerge.checkpoints.spellings import (
    Described,
    Side,
    Tensors,
    buffers,
    open_side,
    tied_to,
    ties,
    two_for_one,
    vocabulary,
)
from distmerge.errors import KeyMismatch

__all__ = ["Described", "NameMatch", "buffers", "match_names"]


@dataclass(frozen=True)
class NameMatch:
    """Where each of the base's tensors is found in another model."""

    own: Mapping[str, str]
    """The base's spelling -> this model's own key, for every tensor to be read: first those of
    the base, in its order, then the extra ones. A key of the base that is absent here is one that
    this model lacks."""
    mappings: tuple[str, ...]
    """Sentences for people, one per kind of difference: `148 keys: transformer.X -> X (...)`."""
    skipped: Mapping[str, str]
    """Own key or alias -> why it isn't read."""
    extra: tuple[str, ...]
    """Keys of `own` that the base doesn't have, spelt as the base would spell them."""


def match_names(
    base: Tensors,
    other: Tensors,
    *,
    base_config: Mapping[str, Any] | None = None,
    other_config: Mapping[str, Any] | None = None,
    base_aliases: Mapping[str, str] | None = None,
    other_aliases: Mapping[str, str] | None = None,
) -> NameMatch:
    """Find each of the base's tensors in another model of the same kind.

    Aliases are names that share another key's storage (alias -> key in the tensors); without a
    config of its own the other model is taken to tie as the base does. Shapes are looked at only
    to tell candidates apart.

    Raises
        KeyMismatch: two tensors of one model stand for the same tensor of the other.
    """
    here, there = open_side(base, base_aliases or {}), open_side(other, other_aliases or {})
    words = vocabulary(base_config, other_config)
    matching = _Matching(here, there, _find_prefix(here, there), words)
    matching.take_tensors()
    matching.take_aliases()
    if ties(base_config if other_config is None else other_config):
        matching.take_tied()
    return matching.result()


_DEPTH = 4
"""Most segments of a prefix, as in `model.language_model.`"""
_HEAD = re.compile(
    r"(lm_head|cls|classifier|score|head|qa_outputs|embed_out|proj_out|output"
    r"|\w+_(head|classifier|projection))\d*\."
)
"""What heads are called: they stand beside the base model, never under its prefix."""


@dataclass(frozen=True)
class _Prefix:
    """Leading segments that only one of the models has."""

    text: str = ""
    on_base: bool = False
    """The base has them and the other model doesn't."""

    def place(self, name: str, base_names: frozenset[str]) -> str:
        """The plain name under which the base has, or would have, a tensor of the other model."""
        if not self.text:
            return name
        if self.on_base:
            longer = self.text + name
            beside = longer not in base_names and (name in base_names or _HEAD.match(name))
            return name if beside else longer
        if not name.startswith(self.text):
            return name
        shorter = name.removeprefix(self.text)
        return name if name in base_names and shorter not in base_names else shorter


def _find_prefix(base: Side, other: Side) -> _Prefix:
    """The prefix whose removal or addition makes the bulk of the names meet, if there is one."""
    base_names, other_names = set(base.names()), set(other.names())
    lone_base, lone_other = base_names - other_names, other_names - base_names
    meeting: dict[_Prefix, list[tuple[str, str]]] = {}
    for text, rest in _cuts(lone_other, base_names):
        meeting.setdefault(_Prefix(text), []).append((rest, text + rest))
    for text, rest in _cuts(lone_base, other_names):
        meeting.setdefault(_Prefix(text, on_base=True), []).append((text + rest, rest))
    enough = max(len(base_names & other_names) + 1, min(len(lone_base), len(lone_other)) / 2)
    meeting = {prefix: pairs for prefix, pairs in meeting.items() if len(pairs) >= enough}
    if not meeting:
        return _Prefix()
    scores = {
        prefix: (sum(base.shape(here) == other.shape(there) for here, there in pairs), len(pairs))
        for prefix, pairs in meeting.items()
    }
    best, *rivals = sorted(scores, key=scores.__getitem__, reverse=True)
    if rivals and scores[rivals[0]] == scores[best]:
        raise _two_parts(meeting[best][0], meeting[rivals[0]][0])
    return best


def _cuts(names: set[str], rests: set[str]) -> Iterator[tuple[str, str]]:
    """(leading segments, rest) of each name whose rest the other model has."""
    for name in sorted(names):
        end = 0
        for _ in range(_DEPTH):
            end = name.find(".", end) + 1
            if not end:
                break
            if name[end:] in rests:
                yield name[:end], name[end:]


@dataclass
class _Matching:
    """What is decided so far about each key of the two models."""

    base: Side
    other: Side
    prefix: _Prefix
    words: frozenset[int]
    """Sizes of the models' vocabularies."""
    placed: dict[str, str] = field(init=False)
    """Plain name in the other model -> plain name in the base."""
    found: dict[str, str] = field(default_factory=dict)
    """Base key -> own key."""
    left: list[str] = field(default_factory=list)
    """Plain names of own tensors that no key of the base has claimed."""
    skipped: dict[str, str] = field(init=False)
    renamed: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(from, to, why) -> how many keys it brought together."""
    shared: list[str] = field(default_factory=list)
    """Sentences about tensors that are read under another name."""

    def __post_init__(self) -> None:
        names = frozenset(self.base.names())
        self.placed = {name: self.prefix.place(name, names) for name in self.other.names()}
        self.skipped = dict(self.other.buffers)

    def take_tensors(self) -> None:
        """Pair the tensors whose names meet."""
        for name, key in self.other.plain.items():
            base_key = self.base.plain.get(self.placed[name])
            if base_key is None:
                self.left.append(name)
            elif base_key in self.found:
                raise two_for_one(base_key, self.found[base_key], key)
            else:
                self.found[base_key] = key
                self._count(name, key, base_key)

    def take_aliases(self) -> None:
        """Pair what the files say is shared, in either model, with what is still open."""
        for name, alias in self.other.aliases.items():
            key = self.other.targets[alias]
            base_key = self.base.plain.get(self.placed[name])
            if base_key is None or self.found.get(base_key) == key:
                self.skipped[alias] = f"alias of {key}"
            elif base_key in self.found:
                raise two_for_one(base_key, self.found[base_key], alias)
            else:
                self._share(base_key, key)
        for name in self.left:
            alias_here = self.base.aliases.get(self.placed[name])
            if alias_here and self.base.targets[alias_here] not in self.found:
                self._share(self.base.targets[alias_here], self.other.plain[name])
        self._drop_used()

    def take_tied(self) -> None:
        """Pair what this model's config says is shared, and skip the copies of it."""
        used = self._drop_used()
        for name, base_key in self.base.plain.items():
            if base_key not in self.found and (key := self._tied_source(name, used)):
                self._share(base_key, key)
        used = self._drop_used()
        for name in self.left:
            sources = tied_to(name, self.other.shape(name), self.other, used, self.words)
            if sources:
                self.skipped[self.other.plain[name]] = f"tied to {sources[0]}"

    def result(self) -> NameMatch:
        """What the base has in its order, then what only this model has."""
        own = {key: self.found[key] for key in self.base.plain.values() if key in self.found}
        extra = []
        for name in self.left:
            key = self.other.plain[name]
            if key not in self.skipped:
                spelling = self.base.respell(self.placed[name])
                if spelling in own:
                    raise two_for_one(spelling, own[spelling], key)
                own[spelling] = key
                extra.append(spelling)
        return NameMatch(own, (*self._sentences(), *self.shared), self.skipped, tuple(extra))

    def _tied_source(self, name: str, used: set[str]) -> str | None:
        """The own key that holds what the base has a tensor of its own for, if only one may."""
        shape = self.base.shape(name)
        left = {self.other.plain[n] for n in self.left}
        for among in (left, used):
            sources = tied_to(name, shape, self.other, among, self.words)
            if sources:
                return sources[0] if len(sources) == 1 else None
        return None

    def _share(self, base_key: str, key: str) -> None:
        self.found[base_key] = key
        self.shared.append(f"{base_key} is read from {key} (tied)")

    def _drop_used(self) -> set[str]:
        used = set(self.found.values())
        self.left = [name for name in self.left if self.other.plain[name] not in used]
        return used

    def _count(self, name: str, key: str, base_key: str) -> None:
        if self.placed[name] != name:
            bare, full = "X", f"{self.prefix.text}X"
            source, target = (bare, full) if self.prefix.on_base else (full, bare)
            self.renamed[source, target, "base-model prefix"] += 1
        if key == name and base_key == self.placed[name]:
            return
        here, there = self.base.rewritings(base_key), self.other.rewritings(key)
        for old, new in there - here:
            self.renamed[old, new, _why(old)] += 1
        for old, new in here - there:
            self.renamed[new, old, _why(old)] += 1

    def _sentences(self) -> Iterable[str]:
        for (source, target, why), count in sorted(self.renamed.items()):
            keys = "1 key" if count == 1 else f"{count} keys"
            yield f"{keys}: {source} -> {target} ({why})"


def _why(old: str) -> str:
    return "wrapper" if old.endswith("X") else "old spelling"


def _two_parts(first: tuple[str, str], second: tuple[str, str]) -> KeyMismatch:
    return KeyMismatch(
        "Two parts of one model fit the other equally well.",
        f"{first[1]} as {first[0]}",
        f"{second[1]} as {second[0]}",
        fix="save the part that is meant with save_pretrained(), and merge that",
    )
