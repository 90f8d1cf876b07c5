"""The row that shows how time grows: with tensors, with bytes and with models, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench import Bench, middle
from benchmarks.models import weight_bytes
from benchmarks.recipes import WORKS, recipe
from benchmarks.results import Check, Curve, Result
from benchmarks.shapes import ModelShape, flat

MB = 10**6


def scaling_row(bench: Bench) -> list[Result]:
    """Linear merges: whole commands, so that a line's left end is start-up."""
    scale = 1 if bench.small else 8
    curves = [_tensors(bench, scale), _bytes(bench, scale), _models(bench, scale)]
    return [*curves, *(_straight(bench, curve) for curve in curves)]


def _tensors(bench: Bench, scale: int) -> Curve:
    """Ever more tensors, ever smaller: the bytes stay."""
    counts = [scale * n for n in (125, 2500, 5000, 10000)]
    total = 16 * MB * scale
    shapes = [_shape(count, total // count // 2) for count in counts]
    seconds = [_time(bench, bench.family(shape)) for shape in shapes]
    return Curve("scaling", "tensors in each of 3 models", "", [float(n) for n in counts], seconds)


def _bytes(bench: Bench, scale: int) -> Curve:
    """Larger tensors: their number stays."""
    sizes = [scale * n * MB for n in (16, 64, 128, 256)]
    shapes = [_shape(64, size // 64 // 2) for size in sizes]
    seconds = [_time(bench, bench.family(shape)) for shape in shapes]
    return Curve("scaling", "bytes of each of 3 models", "MB", [s / MB for s in sizes], seconds)


def _models(bench: Bench, scale: int) -> Curve:
    """More models: each stays as it is. Fewer than four are limited by writing the result, so that
    one more costs next to nothing."""
    shape = _shape(64, 128 * MB * scale // 64 // 2)
    family, counts = bench.family(shape, tuned=11), [4, 5, 7, 12]
    seconds = [_time(bench, family[:count]) for count in counts]
    return Curve("scaling", f"models of {128 * scale} MB", "", [float(n) for n in counts], seconds)


def _shape(tensors: int, elements: int) -> ModelShape:
    return flat(f"flat-{tensors}x{elements}", tensors=tensors, elements=elements)


def _time(bench: Bench, models: Sequence[Path]) -> float:
    path = bench.write_recipe("scaling", recipe(WORKS["linear"], models))
    nbytes = weight_bytes(models[0])
    bench.clear()
    bench.copy(models, nbytes)
    taken = []
    for _ in range(bench.runs):
        taken.append(bench.merge(path).seconds)
        bench.drop_output(nbytes)
    bench.clear()
    return middle(taken)


def _straight(bench: Bench, curve: Curve) -> Check:
    """Does one more cost the same at the large end as at the small one?"""
    (x0, _, x1, x2), (y0, _, y1, y2) = curve.sizes, curve.seconds
    work = f"time against {curve.what}: the last stretch's slope over the first ones'"
    if not y0 < y1 < y2:
        return Check("scaling", work, "less than the noise", "1, at most 1.5", None)
    growth = (y2 - y1) / (x2 - x1) / ((y1 - y0) / (x1 - x0))
    # Were the time quadratic, it would be 1.7 for models, 3 for the others.
    met = None if bench.small else growth <= 1.5
    return Check("scaling", work, f"{growth:.2f}", "1, at most 1.5", met)
