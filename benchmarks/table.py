"""Results as Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.results import Check, Comparison, Curve, Measured, Result, Skipped

R = TypeVar("R", Comparison, Check, Curve, Skipped)

_INTRODUCTION = """\
Whole commands, from start-up to published output, checksums included; page cache warm, loops
compiled; two workers. *Plain copy* reads the inputs from end to end and writes as many bytes as
the merge does, in one thread and through the page cache, which merges write past. A copy,
distmerge, mergekit and distmerge with fsync ran in turn, and each figure is a median over the
runs. Neither mergekit nor the copy
waits for the disk, so *distmerge* doesn't in its first column; the command as it comes does, and
*with fsync* is what it takes. *Peak* is what the largest single process ever had resident."""

_HEADS = (
    "work",
    "distmerge (s)",
    "mergekit (s)",
    "mergekit / distmerge",
    "plain copy (s)",
    "distmerge / copy",
    "peak (MB)",
    "mergekit's peak (MB)",
    "with fsync (s)",
    "wanted",
    "met",
)


def markdown(measured: Sequence[Measured], machine: Sequence[str], plot: str | None) -> str:
    """The whole document."""
    results = [result for row in measured for result in row.results]
    parts = ["# Benchmarks", "", *(f"- {line}" for line in machine), *_taken(measured), ""]
    if comparisons := _of(Comparison, results):
        parts += [_INTRODUCTION, "", *_table(_HEADS, map(_comparison, comparisons))]
        notes = [f"- {r.work}: {r.note}" for r in comparisons if r.note]
        parts += ["", *notes] if notes else []
    if checks := _of(Check, results):
        rows = [(c.work, c.measured, c.wanted, _mark(c.met)) for c in checks]
        parts += ["", *_table(("what", "measured", "wanted", "met"), rows)]
    if skipped := _of(Skipped, results):
        parts += ["", "Not measured:", "", *(f"- {s.work}: {s.reason}" for s in skipped)]
    if plot is not None:
        parts += ["", f"![The figures above, and how time grows]({plot})"]
    return "\n".join(parts).rstrip() + "\n"


def _comparison(found: Comparison) -> tuple[str, ...]:
    theirs = found.mergekit
    return (
        found.work,
        f"{found.ours:.2f}",
        f"{theirs:.1f}" if theirs else "-",
        f"{theirs / found.ours:.1f}" if theirs else "-",
        f"{found.floor:.2f}",
        f"{found.ours / found.floor:.1f}",
        f"{found.peak / 1e6:,.0f}",
        f"{found.mergekit_peak / 1e6:,.0f}" if found.mergekit_peak else "-",
        f"{found.synced:.2f}",
        _wanted(found),
        _mark(found.met) + "; a plain copy takes longer" * found.below_the_floor,
    )


def _wanted(found: Comparison) -> str:
    parts = []
    if found.at_most is not None:
        parts.append(f"1/{1 / found.at_most:.0f} of mergekit")
    if found.copies is not None:
        parts.append(f"{found.copies:g} copies")
    if found.seconds is not None:
        parts.append(f"{found.seconds:.1f} s")
    return ", ".join([*parts, f"{found.most_memory / 1e6:,.0f} MB"])


def _mark(met: bool | None) -> str:
    return "-" if met is None else "yes" if met else "no"


def _taken(measured: Sequence[Measured]) -> list[str]:
    """When, of which commit, and how busy the machine was."""
    if not measured:
        return []
    loads = [row.load for row in measured]
    runs = sorted({row.runs for row in measured})
    times = sorted(row.at for row in measured)
    commits = sorted({row.commit for row in measured})
    return [
        f"- measured {times[0]} to {times[-1]} UTC at {', '.join(commits)}, "
        f"{' or '.join(map(str, runs))} runs of each",
        f"- processes waiting for a core just before a row: {min(loads):.1f} to {max(loads):.1f}",
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]] | map[tuple[str, ...]]) -> list[str]:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _of(kind: type[R], results: Sequence[Result]) -> list[R]:
    return [result for result in results if isinstance(result, kind)]


def plot(measured: Sequence[Measured], path: Path) -> bool:
    """Draw what there is to draw; False if there is nothing.

    Raises
        ImportError: matplotlib isn't installed.
    """
    results = [result for row in measured for result in row.results]
    comparisons, curves = _of(Comparison, results), _of(Curve, results)
    if not comparisons and not curves:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wide = max(len(curves), 1)
    shape: list[Any] = [["bars"] * wide] * bool(comparisons) + [[c.what for c in curves]] * bool(
        curves
    )
    figure, axes = pyplot.subplot_mosaic(
        shape, figsize=(11, 5 * bool(comparisons) + 3.4 * bool(curves)), layout="constrained"
    )
    if comparisons:
        _bars(axes["bars"], comparisons)
    for curve in curves:
        axis = axes[curve.what]
        axis.plot(curve.sizes, curve.seconds, "o-", color="#1f77b4")
        axis.set_xlabel(f"{curve.what}{', ' * bool(curve.unit)}{curve.unit}")
        axis.set_ylabel("linear merge, s")
        axis.margins(y=0.1)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _bars(axis: object, comparisons: Sequence[Comparison]) -> None:
    """Seconds on a logarithmic scale: mergekit, distmerge, plain copy."""
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    series = {
        "mergekit": ([c.mergekit or 0 for c in comparisons], "#c7c7c7"),
        "distmerge": ([c.ours for c in comparisons], "#1f77b4"),
        "plain copy": ([c.floor for c in comparisons], "#2ca02c"),
    }
    for i, (name, (values, colour)) in enumerate(series.items()):
        places = [n + (i - 1) * 0.27 for n in range(len(comparisons))]
        bars = axis.bar(places, values, 0.25, label=name, color=colour)
        labels = [f"{v:.3g}" if v else "" for v in values]
        axis.bar_label(bars, labels=labels, fontsize=7, padding=1)
    axis.set_yscale("log")
    axis.margins(y=0.12)
    axis.set_ylabel("seconds (logarithmic)")
    axis.set_xticks(range(len(comparisons)), [c.row for c in comparisons], rotation=20)
    axis.legend(frameon=False)
