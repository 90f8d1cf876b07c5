"""What came of each candidate, and where that is kept: `results.jsonl` and `results.csv`.

The file is replaced as a whole with every result, so that a killed run leaves each of them once or
not at all. A result holds for the candidate's digest and the evaluator that gave it.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from distmerge.checkpoints.store import OutputStore
from distmerge.errors import OutputError
from distmerge.sweeps.evaluation import Keep, is_better_low

LINES, TABLE, REPORT = "results.jsonl", "results.csv", "report.html"


@dataclass(frozen=True)
class Result:
    """What came of one candidate."""

    name: str
    settings: Mapping[str, Any]
    """Path -> value, as the sweep sets them."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """What its evaluator returned; a lone number is called `score`."""
    distances: Mapping[str, float] = field(default_factory=dict)
    """Parent -> ||candidate - parent|| / ||parent||."""
    place: str | None = None
    """The directory or URL that it was written to; None if it wasn't."""
    error: str | None = None
    """Why it has no scores, or isn't written."""
    seconds: float | None = None
    """That the evaluation took, the candidate's making included."""
    digest: str = ""
    """Of the merge: what its tensors depend on."""
    evaluator: str = ""
    """Of the evaluator's source and settings."""

    @property
    def score(self) -> float | None:
        """The number, or the first of several."""
        return next(iter(self.scores.values()), None)


class Results:
    """The results of a sweep at its place, those of earlier runs included."""

    def __init__(self, output: OutputStore) -> None:
        self._output = output
        self._known = {result.name: result for result in _read(output)}

    def find(self, name: str, digest: str, evaluator: str) -> Result | None:
        """The candidate's scores, if it has some that still hold."""
        found = self._known.get(name)
        if found is None or found.error is not None:
            return None
        return found if (found.digest, found.evaluator) == (digest, evaluator) else None

    def holding(self, digest: str, evaluator: str) -> Result | None:
        """The scores of any candidate that gives these tensors."""
        found = (self.find(name, digest, evaluator) for name in self._known)
        return next((one for one in found if one is not None), None)

    def named(self, name: str) -> Result | None:
        """What there is of a candidate, whether it still holds or not."""
        return self._known.get(name)

    def add(self, result: Result) -> None:
        """Keep a result, durably, instead of an earlier one of the same candidate."""
        self._known.pop(result.name, None)
        self._known[result.name] = result
        lines = [_line(one) for one in self._known.values()]
        self._output.write_bytes(LINES, "".join(lines).encode())


def score_names(results: Iterable[Result]) -> list[str]:
    """Of all scores that there are."""
    return list(dict.fromkeys(name for one in results for name in one.scores))


def parent_names(results: Iterable[Result]) -> list[str]:
    """Of all models that distances are known from."""
    return list(dict.fromkeys(name for one in results for name in one.distances))


def as_csv(results: Sequence[Result]) -> str:
    """A column for each setting, score, and for what became of the candidate."""
    settings = list(dict.fromkeys(path for one in results for path in one.settings))
    scores, parents = score_names(results), parent_names(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parents_columns = [f"distance from {name}" for name in parents]
    writer.writerow(
        ["candidate", *settings, *scores, *parents_columns, "seconds", "written", "error"]
    )
    for one in results:
        given = [_cell(one.settings[path]) if path in one.settings else "" for path in settings]
        got = [one.scores.get(name, "") for name in scores]
        far = [one.distances.get(name, "") for name in parents]
        writer.writerow([one.name, *given, *got, *far, one.seconds, one.place, one.error])
    return text.getvalue()


def ranked(results: Iterable[Result], metric: str, *, lowest: bool) -> list[Result]:
    """Those that have this score, the best first; of equals the one that came first."""
    scored = [one for one in results if metric in one.scores]
    return sorted(scored, key=lambda one: one.scores[metric] * (1 if lowest else -1))


def leading(results: Sequence[Result], keep: Keep) -> tuple[str, bool]:
    """The score that candidates are ranked by, and whether low ones are good: what `keep` goes by,
    else the first."""
    names = score_names(results)
    if keep.metric is not None and keep.metric in names:
        return keep.metric, keep.lowest
    return names[0], is_better_low(names[0])


def leaderboard(results: Sequence[Result], keep: Keep) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each candidate, the best first, those that failed last."""
    names = score_names(results)
    failed = [one for one in results if one.error is not None]
    if not names:
        return [], []
    metric, lowest = leading(results, keep)
    columns = [" #", "candidate", *(f"{name} #" for name in names), "written to"]
    rows = []
    for rank, one in enumerate(ranked(results, metric, lowest=lowest), 1):
        cells = [f"{one.scores[name]:.6g}" if name in one.scores else "" for name in names]
        rows.append([str(rank), one.name, *cells, one.error or one.place or "-"])
    rows += [["", f.name, *[""] * len(names), str(f.error)] for f in failed if not f.scores]
    return columns, rows


def checked_scores(returned: Any) -> dict[str, float]:
    """What an evaluator returned, as names and numbers.

    Raises
        ValueError: it is none, or isn't finite.
    """
    named = returned if isinstance(returned, Mapping) else {"score": returned}
    if not named:
        raise ValueError("the evaluator returned no score")
    found = {}
    for name, value in named.items():
        try:
            if isinstance(value, bool | str):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError, RuntimeError):  # torch's, for a tensor of several numbers
            kind = type(value).__name__
            raise ValueError(f"the evaluator returned a {kind} for {name}, no number") from None
        if not math.isfinite(number):
            raise ValueError(f"the evaluator returned {number} for {name}")
        found[str(name)] = number
    return found


def _read(output: OutputStore) -> list[Result]:
    try:
        lines = output.read_bytes(LINES).decode().splitlines()
        return [Result(**json.loads(line)) for line in lines if line.strip()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, TypeError) as error:
        raise OutputError(
            f"{output.root}/{LINES} holds something else than results of a sweep.",
            str(error),
            fix="move it away, or choose another output",
        ) from None


def _line(result: Result) -> str:
    return json.dumps(asdict(result), ensure_ascii=False, default=str) + "\n"


def _cell(value: Any) -> Any:
    return json.dumps(value, default=str) if isinstance(value, list | dict) else value
