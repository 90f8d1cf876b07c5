"""The space of a sweep: the keys that say which recipes are tried.

    combinations: {of: [law, food, code], size: 2..3}    the models, in every choice of so many
    grid: {parameters.density: [0.2, 0.5], merge_method: [ties, dare_ties]}     every pair
    zip: {models.0.parameters.weight: [0, 1], models.1.parameters.weight: [1, 0]}    side by side
    list: [{seed: 1}, {seed: 2, over: model}]            as they stand
    sample: {count: 8, over: {parameters.weight: {min: 0.1, max: 1}}}           drawn
    exclude: [{merge_method: ties, parameters.density: {max: 0.3}}]

A setting is a path as `--set` takes it and a value. Those of the parts multiply: each candidate
has one choice from every part. What paths mean is the recipe's matter.
"""

from __future__ import annotations

import builtins
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)

from distmerge.errors import RecipeError
from distmerge.sweeps.sampling import TAGS, Axis, points

Settings = dict[str, Any]
"""Path -> value, in the order of the parts."""
Values = Annotated[list[Any], Field(min_length=1)]
SettingPath = Annotated[str, StringConstraints(pattern=r"^[^\s.=]+(\.[^\s.=]+)*$")]
MOST_CANDIDATES = 1000
"""More than these are a slip in the space; nobody reads a table of so many."""
HIDDEN = (*TAGS, "has", "between", "equal")
"""What isn't part of a mistake's place, though pydantic says so."""
_STRICT = ConfigDict(frozen=True, extra="forbid")


class Combinations(BaseModel):
    """Every choice of so many models, in their order, as the recipe's `models`."""

    model_config = _STRICT

    of: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    """Models' names, or items as they stand under `models:`."""
    size: tuple[int, int]
    """Fewest and most models of a candidate; written `2` or `2..4`."""

    @field_validator("size", mode="before")
    @classmethod
    def _read_size(cls, given: Any) -> Any:
        if isinstance(given, int) and not isinstance(given, bool):
            return given, given
        found = re.fullmatch(r"(\d+)\s*\.\.\s*(\d+)", given) if isinstance(given, str) else None
        if found is None:
            raise RecipeError("it is a number of models, such as 2, or a range, such as 2..4")
        return int(found[1]), int(found[2])

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        least, most = self.size
        if not 1 <= least <= most <= len(self.of):
            raise RecipeError(
                f"size {least}..{most} can't be chosen from {len(self.of)} models"
                if least != most
                else f"{least} can't be chosen from {len(self.of)} models"
            )
        return self

    def choices(self) -> Iterator[Settings]:
        """The models of each candidate, fewest first."""
        items = [{"model": one} if isinstance(one, str) else one for one in self.of]
        for size in range(self.size[0], self.size[1] + 1):
            for chosen in itertools.combinations(items, size):
                yield {"models": list(chosen)}

    @property
    def count(self) -> int:
        return sum(math.comb(len(self.of), k) for k in range(self.size[0], self.size[1] + 1))


class Sample(BaseModel):
    """Points drawn from ranges and choices. The same seed gives the same points, and a larger
    count gives those of a smaller one first."""

    model_config = _STRICT

    count: int | None = Field(None, ge=1)
    """None where a search decides how many."""
    over: Annotated[dict[SettingPath, Axis], Field(min_length=1)]
    seed: int = Field(0, ge=0, lt=1 << 63)
    how: Literal["random", "sobol"] = "sobol"
    """Independent draws, or a scrambled Sobol sequence, which leaves smaller gaps."""

    def choices(self) -> Iterator[Settings]:
        assert self.count is not None
        return points(self.over, self.count, seed=self.seed, sobol=self.how == "sobol")


class Has(BaseModel):
    """A rule for a list: all of these are in it."""

    model_config = _STRICT

    has: Values


class Between(BaseModel):
    """A rule for numbers: not less, not more."""

    model_config = _STRICT

    min: float = -math.inf
    max: float = math.inf


def _kind(given: Any) -> str:
    if isinstance(given, dict) and given.keys() & {"min", "max", "has"}:
        return "has" if "has" in given else "between"
    return "equal"


Test = Annotated[
    Annotated[Has, Tag("has")] | Annotated[Between, Tag("between")] | Annotated[Any, Tag("equal")],
    Discriminator(_kind),
]
Rule = dict[SettingPath, Test]
"""Excludes candidates that fit every entry: a value, a list of values, `{min, max}`, `{has}`."""


class Space(BaseModel):
    """Which candidates there are."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    combinations: Combinations | None = None
    grid: dict[SettingPath, Values] = {}
    zipped: dict[SettingPath, Values] = Field({}, alias="zip")
    listed: builtins.list[dict[SettingPath, Any]] | None = Field(None, alias="list", min_length=1)
    sample: Sample | None = None
    exclude: builtins.list[Annotated[Rule, Field(min_length=1)]] = []

    @field_validator("zipped")
    @classmethod
    def _check_zip(cls, given: dict[str, list[Any]]) -> dict[str, list[Any]]:
        lengths = {path: len(values) for path, values in given.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{path} has {count}" for path, count in lengths.items())
            raise RecipeError(f"its lists go side by side and must be equally long: {told}")
        return given

    def _check_paths(self) -> None:
        seen: dict[str, str] = {}
        for part, paths in self._paths():
            for path in paths:
                if seen.setdefault(path, part) != part:
                    raise RecipeError(
                        f"{path} is set by {seen[path]} and by {part}.", fix="keep one of the two"
                    )
                if "storage_options" in path.split("."):
                    # A candidate's settings are its name, and stand in tables and reports.
                    raise RecipeError(
                        "A sweep can't vary storage options, which may be secret.",
                        f"{part} sets {path}",
                        fix="give them in the recipe, for each bucket: "
                        "storage_options: {'s3://bucket/': {...}}",
                    )

    def spelling(self, path: str) -> str:
        """`grid: parameters.density`: what messages call a path that the space sets."""
        part = next(part for part, paths in self._paths() if path in paths)
        return f"{part}: {path}"

    def _paths(self) -> Iterator[tuple[str, builtins.list[str]]]:
        if self.combinations:
            yield "combinations", ["models"]
        yield "grid", list(self.grid)
        yield "zip", list(self.zipped)
        yield "list", list(dict.fromkeys(path for item in self.listed or () for path in item))
        if self.sample:
            yield "sample", list(self.sample.over)

    def candidates(self) -> builtins.list[Settings]:
        """The settings of each candidate, each once, in the order of the parts, the last one
        changing fastest.

        Raises
            RecipeError: none is left, there are too many, a path is set twice, a rule names one
                that nothing sets.
        """
        self._check_size()
        every = [
            {path: value for part in chosen for path, value in part.items()}
            for chosen in itertools.product(*self._parts())
        ]
        known = {path for _, paths in self._paths() for path in paths}
        for rule in self.exclude:
            for path in rule:
                if path not in known:
                    raise RecipeError(
                        f"exclude names {path}, which the sweep doesn't set.",
                        f"it sets {', '.join(sorted(known))}",
                        fix="write the path as grid, zip, list or sample have it",
                    )
        left = [settings for settings in every if not any(fits(r, settings) for r in self.exclude)]
        if not left:
            raise RecipeError(
                "No candidate is left: the rules under exclude take them all.",
                f"there were {len(every)}",
                fix="take a rule out of exclude, or make it narrower",
            )
        unique: builtins.list[Settings] = []
        for settings in left:
            if settings not in unique:
                unique.append(settings)
        return unique

    def _parts(self) -> Iterator[builtins.list[Settings]]:
        if self.combinations:
            yield list(self.combinations.choices())
        for path, values in self.grid.items():
            yield [{path: value} for value in values]
        if self.zipped:
            yield self.zipped_rows()
        if self.listed:
            yield list(self.listed)
        if self.sample:
            yield list(self.sample.choices())

    def zipped_rows(self) -> builtins.list[Settings]:
        """What goes side by side."""
        rows = zip(*self.zipped.values(), strict=True)
        return [dict(zip(self.zipped, row, strict=True)) for row in rows]

    def check_parts(self) -> None:
        """Raises RecipeError: nothing is varied, or a path is set twice."""
        if not any(paths for _, paths in self._paths()):
            raise RecipeError(
                "There is nothing to sweep over: the space is empty.",
                fix="grid: {parameters.density: [0.2, 0.5, 0.8]}",
            )
        self._check_paths()

    def _check_size(self) -> None:
        """Count before anything is made: products grow fast."""
        counts = [len(values) for values in self.grid.values()]
        counts += [self.combinations.count] if self.combinations else []
        counts += [len(next(iter(self.zipped.values())))] if self.zipped else []
        counts += [len(self.listed)] if self.listed else []
        if self.sample:
            if self.sample.count is None:
                raise RecipeError(
                    "sample doesn't say how many points are drawn.",
                    fix="sample: {count: 8, over: {...}}",
                )
            counts.append(self.sample.count)
        self.check_parts()
        if math.prod(counts) > MOST_CANDIDATES:
            raise RecipeError(
                f"The space has {math.prod(counts):,} candidates, and {MOST_CANDIDATES:,} are the "
                "most.",
                f"its parts have {' x '.join(map(str, counts))}",
                fix="take values out, or put the paths under 'sample: {count: 64, over: ...}'",
            )


def fits(rule: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Does a candidate have all that a rule names?"""
    return all(path in settings and _holds(test, settings[path]) for path, test in rule.items())


def _holds(test: Any, value: Any) -> bool:
    if isinstance(test, Has):
        members = value if isinstance(value, list) else [value]
        names = [one.get("model", one) if isinstance(one, dict) else one for one in members]
        return all(one in names for one in test.has)
    if isinstance(test, Between):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and test.min <= value <= test.max
    return bool(value == test or (isinstance(test, list) and value in test))
