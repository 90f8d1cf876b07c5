"""`report.html`: a sweep's results as a page of its own, without scripts and without a network.

Parallel coordinates, the score against each setting and against the distance from each parent, and
the table. What a mark is, is told when the pointer rests on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from distmerge.sweeps.evaluation import Keep
from distmerge.sweeps.results import Result, leading, parent_names, ranked, score_names

WIDTH, HEIGHT, EDGE = 420, 260, 46
"""Of a drawing, and the room around its axes, in pixels."""
_STYLE = """
body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1000px;padding:0 1em;color:#222}
svg{max-width:100%;height:auto}text{font-size:11px;fill:#444}.axis{stroke:#aaa}
table{border-collapse:collapse}
td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}
td:nth-child(2),th:nth-child(2){text-align:left}figure{display:inline-block;margin:0 1em 1em 0}
.line{fill:none;stroke-width:1.5;opacity:.7}
.line:hover,circle:hover{stroke:#000;stroke-width:3;opacity:1}
"""


def as_html(results: Sequence[Result], keep: Keep) -> str:
    """The page, for results of which some have scores."""
    metric, lowest = leading(results, keep)
    best = ranked(results, metric, lowest=lowest)
    columns = _columns(best)
    colours = _colours(best)
    scores = _Column(metric, [result.scores[metric] for result in best])
    pictures = [_parallel([*columns.values(), scores], best, colours)]
    pictures += [_scatter(column, scores, best, colours) for column in columns.values()]
    order = "lowest" if lowest else "highest"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Sweep</title>'
        f"<style>{_STYLE}</style></head><body><h1>{len(results)} candidates</h1>"
        f"<p>By {escape(metric)}, the {order} is the best. Dark marks are better ones.</p>"
        f"{''.join(f'<figure>{one}</figure>' for one in pictures)}"
        f"{_table(best, results)}</body></html>\n"
    )


class _Column:
    """The values of one axis: numbers where all are, else names at equal distances."""

    def __init__(self, name: str, values: Sequence[Any]) -> None:
        self.name = name
        self.numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        self.texts = [_text(value) for value in values]
        names = list(dict.fromkeys(self.texts))
        self.places = [
            float(value) if self.numeric else float(names.index(text))
            for value, text in zip(values, self.texts, strict=True)
        ]
        self.low, self.high = min(self.places), max(self.places)

    def at(self, number: int) -> float:
        """0 to 1 along the axis; the middle where all are alike."""
        span = self.high - self.low
        return (self.places[number] - self.low) / span if span else 0.5

    @property
    def ends(self) -> list[tuple[float, str]]:
        """What stands beside the axis, and where along it."""
        if self.numeric:
            return sorted({0.0: f"{self.low:.4g}", 1.0: f"{self.high:.4g}"}.items())
        return sorted({self.at(i): text for i, text in enumerate(self.texts)}.items())


def _columns(best: Sequence[Result]) -> dict[str, _Column]:
    """Settings and distances that every candidate has and that differ, by name."""
    rows: list[Mapping[str, Any]] = [
        {**one.settings, **{f"distance from {n}": d for n, d in one.distances.items()}}
        for one in best
    ]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    columns = {name: _Column(name, [row[name] for row in rows]) for name in names}
    return {name: column for name, column in columns.items() if len(set(column.places)) > 1}


def _colours(best: Sequence[Result]) -> list[str]:
    """Dark for the first, light for the last."""
    last = max(len(best) - 1, 1)
    return [f"hsl(215 70% {25 + 50 * rank / last:.0f}%)" for rank in range(len(best))]


def _parallel(columns: Sequence[_Column], best: Sequence[Result], colours: Sequence[str]) -> str:
    width = max(WIDTH, 2 * EDGE + 150 * (len(columns) - 1))
    step = (width - 2 * EDGE) / max(len(columns) - 1, 1)
    parts = []
    for rank in reversed(range(len(best))):
        points = " ".join(
            f"{EDGE + i * step:.1f},{_height(column.at(rank)):.1f}"
            for i, column in enumerate(columns)
        )
        parts.append(
            f'<polyline class="line" stroke="{colours[rank]}" points="{points}">'
            f"<title>{_told(best[rank])}</title></polyline>"
        )
    for i, column in enumerate(columns):
        x = EDGE + i * step
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{EDGE}" y2="{HEIGHT - EDGE}"/>')
        parts.append(_label(x, HEIGHT - 12, column.name))
        parts += [_label(x, _height(at) + (14 if at == 0 else -4), t) for at, t in column.ends]
    return _svg(width, parts)


def _scatter(
    column: _Column, scores: _Column, best: Sequence[Result], colours: Sequence[str]
) -> str:
    inner = WIDTH - 2 * EDGE
    parts = [
        f'<line class="axis" x1="{EDGE}" x2="{EDGE}" y1="{EDGE}" y2="{HEIGHT - EDGE}"/>',
        f'<line class="axis" x1="{EDGE}" x2="{WIDTH - EDGE}" y1="{HEIGHT - EDGE}" '
        f'y2="{HEIGHT - EDGE}"/>',
        _label(WIDTH / 2, HEIGHT - 8, column.name),
        _label(EDGE, EDGE - 18, scores.name),
    ]
    parts += [_label(EDGE + at * inner, HEIGHT - EDGE + 16, text) for at, text in column.ends]
    parts += [_label(EDGE / 2, _height(at) + 4, text) for at, text in scores.ends]
    for rank in reversed(range(len(best))):
        x, y = EDGE + column.at(rank) * inner, _height(scores.at(rank))
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colours[rank]}">'
            f"<title>{_told(best[rank])}</title></circle>"
        )
    return _svg(WIDTH, parts)


def _height(at: float) -> float:
    return HEIGHT - EDGE - at * (HEIGHT - 2 * EDGE)


def _svg(width: float, parts: Sequence[str]) -> str:
    inside = "".join(parts)
    return f'<svg viewBox="0 0 {width:.0f} {HEIGHT}" width="{width:.0f}">{inside}</svg>'


def _label(x: float, y: float, text: str) -> str:
    shown = text if len(text) <= 24 else f"...{text[-21:]}"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(shown)}</text>'


def _told(result: Result) -> str:
    lines = [result.name, *(f"{name}: {value:.6g}" for name, value in result.scores.items())]
    return escape("\n".join(lines))


def _table(best: Sequence[Result], results: Sequence[Result]) -> str:
    scores, parents = score_names(results), parent_names(results)
    heads = ["", "candidate", *scores, *(f"distance from {p}" for p in parents), "written to"]
    rows = [
        [str(rank), one.name, *(_number(one.scores.get(name)) for name in scores)]
        + [_number(one.distances.get(name)) for name in parents]
        + [one.place or one.error or ""]
        for rank, one in enumerate(best, 1)
    ]
    empty = [""] * (len(scores) + len(parents))
    rows += [["", one.name, *empty, one.error or ""] for one in results if one not in best]
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        models = [one.get("model", one) if isinstance(one, dict) else one for one in value]
        return " + ".join(map(_text, models))
    return value if isinstance(value, str) else json.dumps(value, default=str)
