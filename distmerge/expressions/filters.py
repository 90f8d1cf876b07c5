"""Filters of parameters that fit nothing: known once every key's parameters have been settled.

mergekit takes a filter for a part of a tensor's name, and passes over one that is a part of none;
so a misspelt one leaves its value out without a word.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from distmerge.methods.parameters import Fallback, Filtered, fits

_OFFERED = 3
"""Parts of names that a sentence offers."""
_NUMBER = re.compile(r"(?<=\.)\d+\.")


@dataclass
class FilterUse:
    """Which filters counted, gathered over all keys."""

    _levels: dict[int, tuple[Filtered, set[int]]] = field(default_factory=dict)
    """By identity, the values with filters, and which of their choices counted."""
    _names: dict[str, None] = field(default_factory=dict)
    """What filters were shown."""

    def note(self, value: Any, name: str) -> None:
        """Note which filter of a parameter's value counts for a key of this name."""
        settled = False
        for level in value.levels if isinstance(value, Fallback) else (value,):
            if not isinstance(level, Filtered) or not level.places:
                return
            if id(level) not in self._levels:
                self._levels[id(level)] = level, set()
            self._names[name] = None
            counts = None if settled else level.choice(name)
            if counts is not None:
                self._levels[id(level)][1].add(counts)
                settled = True

    def idle(self, keys: Collection[str]) -> Iterator[str]:
        """A sentence for each filter that counted for no tensor.

        keys: all tensors, those that aren't merged too.
        """
        counted: dict[tuple[str, int, str | None], bool] = {}
        for level, used in self._levels.values():  # one place may hold for several models
            for i, (place, (pattern, _)) in enumerate(
                zip(level.places, level.choices, strict=True)
            ):
                choice = place, i, pattern
                counted[choice] = counted.get(choice, False) or i in used
        for (place, _, pattern), has_counted in counted.items():
            if has_counted or pattern in (None, "*"):
                continue  # what is left over may be nothing
            if any(fits(pattern, name) for name in self._names):
                told = "has no effect: what stands before it takes every tensor that it fits"
            elif any(fits(pattern, key) for key in keys):
                told = "has no effect: the tensors that it fits aren't merged"
            else:
                told = f"is a part of no tensor's name; {_nearest(str(pattern), self._names)}"
            yield f"{place}: the filter {pattern!r} {told}."


def _nearest(pattern: str, names: Collection[str]) -> str:
    """The parts of names that are most like a filter, of as many words as it has."""
    words = pattern.strip(".").count(".") + 1
    parts = dict.fromkeys(
        ".".join(split[i : i + words])
        for split in (_NUMBER.sub("", name).split(".") for name in names)
        for i in range(len(split) - words + 1)
    )
    near = difflib.get_close_matches(pattern.strip("."), parts, _OFFERED, cutoff=0.4)
    return f"the nearest are {', '.join(map(repr, near))}" if near else "leave it out"
