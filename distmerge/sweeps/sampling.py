"""Points of a space that are drawn: from ranges of numbers and from lists of choices."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    Tag,
    model_validator,
)

from distmerge.errors import RecipeError

DIGITS = 4
"""Significant digits of what is drawn, so that a candidate's name says its values exactly."""


class Range(BaseModel):
    """Numbers between two bounds, both included."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: FiniteFloat
    max: FiniteFloat
    log: bool = False
    """Draw the logarithm evenly, not the number."""
    integer: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise RecipeError(f"min {self.min:g} is more than max {self.max:g}")
        if self.log and self.min <= 0:
            raise RecipeError(f"a logarithmic range begins above 0, not at {self.min:g}")
        if self.integer and math.ceil(self.min) > math.floor(self.max):
            raise RecipeError(f"there is no integer between {self.min:g} and {self.max:g}")
        return self

    def at(self, share: float) -> float | int:
        """The number at a share of the way, 0 to 1 without 1."""
        if self.integer:
            first, last = math.ceil(self.min), math.floor(self.max)
            # The bounds are stretched by half, so that they are drawn as often as the others.
            spread = (last + 0.5) - (first - 0.5)
            place = first - 0.5 + share * spread
            if self.log:
                low, high = math.log(max(first - 0.5, 0.5)), math.log(last + 0.5)
                place = math.exp(low + share * (high - low))
            return min(max(round(place), first), last)
        if self.log:
            low, high = math.log(self.min), math.log(self.max)
            place = math.exp(low + share * (high - low))
        else:
            place = self.min + share * (self.max - self.min)
        rounded = float(f"{place:.{DIGITS}g}")
        return min(max(rounded, self.min), self.max)


Choices = Annotated[list[Any], Field(min_length=1)]
Axis = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")],
    Discriminator(lambda given: "choices" if isinstance(given, list) else "range"),
]
"""What one path is drawn from."""
TAGS = ("range", "choices")
"""Words that pydantic puts into the place of a mistake, and no file holds."""


def points(
    over: Mapping[str, Range | list[Any]], count: int, *, seed: int, sobol: bool
) -> Iterator[dict[str, Any]]:
    """`count` points, path -> value."""
    shares = sobol_shares if sobol else _random_shares
    for drawn in shares(len(over), count, seed):
        yield {path: at(one, share) for (path, one), share in zip(over.items(), drawn, strict=True)}


def at(axis: Range | list[Any], share: float) -> Any:
    """What lies at a share of the way along an axis, 0 to 1 without 1."""
    return axis.at(share) if isinstance(axis, Range) else axis[int(share * len(axis))]


def sobol_shares(dimensions: int, count: int, seed: int, first: int = 0) -> list[list[float]]:
    """Points of a scrambled Sobol sequence from number `first` on: shares, 0 to 1 without 1."""
    import torch

    engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    engine.fast_forward(first)  # type: ignore[no-untyped-call]
    found: list[list[float]] = (
        engine.draw(count, dtype=torch.float64).clamp_(0, 1 - 2**-53).tolist()
    )
    return found


def _random_shares(dimensions: int, count: int, seed: int) -> list[list[float]]:
    draw = random.Random(seed)
    return [[draw.random() for _ in range(dimensions)] for _ in range(count)]
