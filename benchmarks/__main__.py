"""Options in, tables out. See the package's docstring."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from benchmarks import limits
from benchmarks.bench import Bench, find_mergekit
from benchmarks.clients import clients_row
from benchmarks.comparisons import gpt2_row, method_row
from benchmarks.link import link_row
from benchmarks.machine import commit, describe
from benchmarks.mergekit_env import versions
from benchmarks.recipes import WORKS
from benchmarks.results import Ledger, Measured, Result, Skipped, load_average
from benchmarks.scaling import scaling_row
from benchmarks.sweep_link import sweep_link_row
from benchmarks.sweep_local import sweep_row
from benchmarks.table import markdown, plot
from benchmarks.tools import CommandFailed

Row = Callable[[Bench], list[Result]]

ROWS: dict[str, Row] = {
    **{method: partial(method_row, method=method) for method in WORKS},
    "ties-gpt2": gpt2_row,
    "plan": limits.plan_row,
    "help": limits.help_row,
    "import": limits.import_row,
    "ray": limits.ray_row,
    "threads": limits.threads_row,
    "cores": limits.cores_row,
    "large-tensor": limits.large_tensor_row,
    "7b": limits.seven_billion_row,
    "scaling": scaling_row,
    "link": link_row,
    "clients": clients_row,
    "sweep": sweep_row,
    "sweep-link": sweep_link_row,
}
"""In the order of the tables."""


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if a row could not be measured, 2 if another measures here."""
    options = _options(words)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if options.list:
        print("\n".join(ROWS))
        return 0
    work = options.work_dir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:  # a second one here would remove what this one writes
        with FileLock(work / "benchmarks.lock", timeout=0):
            return _run(options, work)
    except Timeout:
        print(f"Another benchmark runs in {work}; --work-dir names another place.", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, work: Path) -> int:
    small = options.size == "small"
    mergekit = find_mergekit(work, options.mergekit, skipped=options.skip_mergekit)
    bench = Bench(work, small, options.runs, mergekit)
    ledger = Ledger(work / f"results-{options.size}.json")
    # Only the rows asked for are told, unless those of earlier runs are asked for as well.
    names = list(options.rows)
    failed = [name for name in names if not _measure(bench, name, ledger)]
    told = ledger.of(ROWS if options.keep else [name for name in ROWS if name in names])
    machine = describe(work)
    if mergekit is not None:
        machine.append(versions(mergekit))
    out = options.out or (work / "docs" if small else Path("docs"))
    print(_write(out, told, machine))
    return 1 if failed else 0


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rows", type=_rows, default=list(ROWS), help="separated by commas")
    parser.add_argument("--size", choices=("1.1B", "small"), default="1.1B")
    parser.add_argument("--runs", type=int, default=3, help="of each command; default: 3")
    parser.add_argument("--keep", action="store_true", help="tell rows of earlier runs as well")
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument("--mergekit", type=Path, help="a mergekit-yaml script to use")
    parser.add_argument("--out", type=Path, help="folder to write to; default: docs")
    parser.add_argument("--list", action="store_true", help="the rows there are")
    default = Path(tempfile.gettempdir(), "distmerge-benchmarks")
    parser.add_argument("--work-dir", type=Path, default=default, help=f"default: {default}")
    return parser.parse_args(words)


def _rows(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ROWS:
            raise argparse.ArgumentTypeError(f"no row {name!r}; there are {', '.join(ROWS)}")
    return names


def _measure(bench: Bench, name: str, ledger: Ledger) -> bool:
    """Measure one row and keep it; a row that fails says so in the tables and stops no other."""
    load = load_average()
    bench.say(f"{name} (load {load}) ...")
    try:
        results = ROWS[name](bench)
        done = True
    except CommandFailed as error:
        bench.say(str(error))
        reason = str(error).strip().splitlines()[-1]
        results, done = [Skipped(name, name, f"failed: {reason}")], False
    for result in results:
        bench.say(f"  {result}")
    ledger.record(name, Measured(results, load=load, commit=commit(), runs=bench.runs))
    bench.clear()
    return done


def _write(out: Path, told: list[Measured], machine: list[str]) -> str:
    out.mkdir(parents=True, exist_ok=True)
    drawn = None
    try:
        if plot(told, out / "benchmarks.png"):
            drawn = "benchmarks.png"
    except ImportError:
        machine = [*machine, "no plot: matplotlib is not installed (`pip install -e .[bench]`)"]
    text = markdown(told, machine, drawn)
    (out / "benchmarks.md").write_text(text)
    return text


if __name__ == "__main__":
    raise SystemExit(main())
