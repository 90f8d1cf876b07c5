"""What was measured, as it is kept between runs of single rows."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """distmerge, mergekit and a plain copy on the same work. Times are medians, in seconds."""

    row: str
    work: str
    ours: float
    """Without waiting for the disk, as the other two don't wait either."""
    synced: float
    """The command as it is, fsync included."""
    floor: float
    """The plain copy."""
    peak: int
    """Bytes, of our largest process."""
    cpu: float
    """Processor seconds of `ours`."""
    mergekit: float | None = None
    mergekit_peak: int | None = None
    mergekit_cpu: float | None = None
    alike: float | None = None
    """Correlation of what both tools added to the base, on one tensor."""
    at_most: float | None = None
    """Wanted: share of mergekit's time, start-up included in both."""
    copies: float | None = None
    """Wanted: multiple of the plain copy's time."""
    seconds: float | None = None
    """Wanted: whatever mergekit takes."""
    most_memory: float = 1.5e9
    """Wanted: bytes of our largest process."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Is it as fast and as small as wanted? None if there was no speed to tell by."""
        told = []
        if self.at_most is not None and self.mergekit is not None:
            told.append(self.ours <= self.at_most * self.mergekit)
        if self.copies is not None:
            told.append(self.ours <= self.copies * self.floor)
        if self.seconds is not None:
            told.append(self.ours <= self.seconds)
        return all(told) and self.peak <= self.most_memory if told else None

    @property
    def below_the_floor(self) -> bool:
        """Is less wanted than copying the bytes takes?"""
        known = self.at_most is not None and self.mergekit is not None
        return known and self.at_most * self.mergekit < self.floor  # type: ignore[operator]


@dataclass(frozen=True)
class Check:
    """Something with a limit of its own."""

    row: str
    work: str
    measured: str
    wanted: str
    met: bool | None


@dataclass(frozen=True)
class Curve:
    """Seconds against one size while the others stay."""

    row: str
    what: str
    unit: str
    sizes: list[float]
    seconds: list[float]


@dataclass(frozen=True)
class Skipped:
    """A row that was not measured."""

    row: str
    work: str
    reason: str


Result = Comparison | Check | Curve | Skipped
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Comparison, Check, Curve, Skipped)}


@dataclass
class Measured:
    """One row's results, and the circumstances."""

    results: list[Result]
    at: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M", time.gmtime()))
    """UTC."""
    load: float = 0.0
    """Processes that wanted a core just before, on average over a minute."""
    commit: str = ""
    runs: int = 0

    def to_json(self) -> dict[str, Any]:
        listed = [{"kind": type(result).__name__, **asdict(result)} for result in self.results]
        return {**asdict(self), "results": listed}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measured:
        listed = [dict(result) for result in data.pop("results")]
        return cls([_KINDS[result.pop("kind")](**result) for result in listed], **data)


def load_average() -> float:
    """Processes that want a core, over the last minute."""
    return round(os.getloadavg()[0], 1)


class Ledger:
    """All rows that were measured with models of one size, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = json.loads(path.read_text()) if path.exists() else {}
        self.rows = {row: Measured.from_json(data) for row, data in kept.items()}

    def record(self, row: str, measured: Measured) -> None:
        """Put a row in the place of an older one."""
        self.rows[row] = measured
        data = {name: kept.to_json() for name, kept in self.rows.items()}
        self._path.write_text(json.dumps(data, indent=1))

    def of(self, order: Iterable[str]) -> list[Measured]:
        """Rows that there are, in that order."""
        return [self.rows[row] for row in order if row in self.rows]
