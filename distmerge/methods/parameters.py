"""Parameter values that differ by layer or by key, resolved to plain ones for each key.

A value is a scalar; a gradient, which runs over the layers of the model; or filtered, a list
of (substring, value) of which the first whose substring occurs in the key counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from distmerge.errors import ParameterError

LARGEST = float(np.finfo(np.float32).max)
"""What float32 holds: a larger number is infinite there, and what is divided by it zero."""
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
"""float32's smallest number above zero."""
NO_MATCH: Any = object()
"""No filter matched: the next level's value counts, or the method's default."""

_NUMBERED = re.compile(r"(?:^|\.)(\d+)(?=\.)")


@dataclass(frozen=True, slots=True)
class Gradient:
    """Values spread evenly over the layers, from the first to the last."""

    values: tuple[Any, ...]

    def at(self, position: float) -> Any:
        """The value at 0 (first layer) to 1 (last): numbers interpolate, others step."""
        last = len(self.values) - 1
        if not all(type(v) in (int, float) for v in self.values):
            return self.values[int(position * last)]
        left = min(int(position * last), max(last - 1, 0))
        right = min(left + 1, last)
        share = position * last - left
        return self.values[left] * (1.0 - share) + self.values[right] * share

    def __str__(self) -> str:
        return "[" + ", ".join(map(str, self.values)) + "]"


@dataclass(frozen=True, slots=True)
class Filtered:
    """Values by key; a filter of None or "*" matches every key."""

    choices: tuple[tuple[str | None, Any], ...]
    places: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Where each stands in a recipe, for messages."""

    def choice(self, key: str) -> int | None:
        """Which of the choices counts; None if none fits."""
        for i, (pattern, _) in enumerate(self.choices):
            if fits(pattern, key):
                return i
        return None

    def for_key(self, key: str) -> Any:
        found = self.choice(key)
        return NO_MATCH if found is None else self.choices[found][1]

    def __str__(self) -> str:
        return "{" + ", ".join(f"{p or '*'}: {v}" for p, v in self.choices) + "}"


@dataclass(frozen=True, slots=True)
class Fallback:
    """Levels of precedence: the first that has a value for the key counts."""

    levels: tuple[Any, ...]

    def __str__(self) -> str:
        return " else ".join(map(str, self.levels))


def in_float32(value: Any) -> bool:
    """Can arithmetic in float32 take it? What is no float always fits."""
    return not isinstance(value, float) or abs(value) <= LARGEST  # NaN is never less


def too_large(method: str, name: str, value: float) -> ParameterError:
    """The error for a number that doesn't fit."""
    return ParameterError(
        f"{method}: {name} can't be {value!r}.",
        f"it has to be a finite number, and float32 holds up to {LARGEST:.1e}",
        fix=f"'{name}: 1.0', or see 'distmerge methods {method}'",
    )


def fits(pattern: str | None, key: str) -> bool:
    """Does a filter let a key through?"""
    return pattern is None or pattern in key or pattern == "*"


def resolve(value: Any, key: str, layers: Layers, name: str | None = None) -> Any:
    """The plain value for one key; `NO_MATCH` if no filter matches.

    name: what filters see, if not the key.
    """
    if isinstance(value, Fallback):
        found = (resolve(level, key, layers, name) for level in value.levels)
        return next((v for v in found if v is not NO_MATCH), NO_MATCH)
    if isinstance(value, Filtered):
        return resolve(value.for_key(name or key), key, layers, name)
    if isinstance(value, Gradient):
        return value.at(layers.position(key))
    return value


def layer_of(key: str) -> tuple[str, int] | None:
    """A key's layer: the family that its number counts in, and the number.

    The outermost `prefix.N.` counts, so experts and attention heads inside a layer don't:
    `model.layers.3.mlp.experts.7.up.weight` is layer 3 of `model.layers`. Experts are never
    layers, outermost or not.
    """
    for found in _NUMBERED.finditer(key):
        family = key[: found.start(1)].rstrip(".")
        if not family.endswith("experts"):
            return family, int(found.group(1))
    return None


@dataclass(frozen=True)
class Layers:
    """How many layers each family of a model has, read off its keys."""

    counts: Mapping[str, int]
    """By family: one more than the highest number."""
    firsts: Mapping[str, int] = field(default_factory=dict)
    """By family, where its numbers begin, if not at 0."""

    @classmethod
    def of(cls, keys: Iterable[str]) -> Layers:
        counts: dict[str, int] = {}
        for key in keys:
            found = layer_of(key)
            if found:
                counts[found[0]] = max(counts.get(found[0], 0), found[1] + 1)
        return cls(counts)

    @cached_property
    def main(self) -> str | None:
        """The family with most layers."""
        return max(self.counts, key=lambda family: self.counts[family], default=None)

    def position(self, key: str) -> float:
        """0 at the first layer, 1 at the last of the key's family; 0 outside layers."""
        found = layer_of(key)
        if found is None:
            return 0.0
        first = self.firsts.get(found[0], 0)
        last = self.counts.get(found[0], 1) - 1
        return (found[1] - first) / (last - first) if last > first else 1.0
