"""`distmerge sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from distmerge.cli import options
from distmerge.cli.failures import reported
from distmerge.cli.merging import ALLOWED_MEM, check_lasting, show_plan, warn
from distmerge.run.progress import watching

if TYPE_CHECKING:
    from distmerge.run.options import MergeOptions
    from distmerge.sweeps.definition import Sweep
    from distmerge.sweeps.evaluation import Keep
    from distmerge.sweeps.results import Result
    from distmerge.sweeps.scratch import Scratch


@reported
def sweep(
    space: Annotated[
        str,
        typer.Argument(metavar="SWEEP", help="A recipe with grid, zip, list, sample, ..., or -."),
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Each candidate is written to OUT/NAME.")
    ],
    engine: options.Engine = options.EngineName.local,
    address: options.Address = None,
    workers: options.Workers = None,
    allowed_mem: options.AllowedMem = ALLOWED_MEM,
    scratch: options.ScratchFolder = None,
    scratch_size: options.ScratchSize = None,
    max_shard_size: options.MaxShardSize = None,
    out_dtype: options.OutDtype = None,
    device: options.Device = options.DeviceName.cpu,
    seed: options.Seed = None,
    overwrite: options.Overwrite = False,
    allow_non_finite: options.AllowNonFinite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show candidates and cost, write nothing.")
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.AsEvents = False,
    event_log: options.EventLog = None,
    overrides: options.Overrides = None,
    strict: options.Strict = False,
    trace: options.Trace = False,
) -> None:
    """Merge many variants of one recipe."""
    from distmerge.run.options import MergeOptions
    from distmerge.sweeps.definition import load_sweep
    from distmerge.sweeps.scratch import Scratch

    check_lasting(out)
    wanted = load_sweep(space, overrides=overrides or (), strict=strict)
    for text in wanted.warnings:
        warn(text)
    given = {
        "engine": engine.value,
        "address": address,
        "workers": workers,
        "allowed_mem": allowed_mem,
        "max_shard_size": max_shard_size,
        "out_dtype": out_dtype,
        "device": device.value,
        "seed": seed,
        "overwrite": overwrite,
        "allow_non_finite": allow_non_finite,
        "strict": strict,
    }
    settings = MergeOptions.of("sweep", given)
    where = Scratch(scratch, scratch_size)
    if dry_run:
        return _show(wanted, out, settings, where, as_json=as_json)
    _run(wanted, out, settings, where, event_log, as_json=as_json, quiet=quiet)


def _show(
    wanted: Sweep, out: str, settings: MergeOptions, scratch: Scratch, *, as_json: bool
) -> None:
    from distmerge.sweeps.plan import plan_sweep

    with watching(told=wanted.warnings) as watcher:
        decided = plan_sweep(wanted, settings, out=out, scratch=scratch, listener=watcher)
    show_plan(decided, as_json=as_json)


def _run(
    wanted: Sweep,
    out: str,
    settings: MergeOptions,
    scratch: Scratch,
    event_log: str | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    from distmerge.run.log_file import logged
    from distmerge.sweeps.plan import plan_sweep
    from distmerge.sweeps.run import run_planned

    told = (lambda results, by: None) if as_json or quiet else show_results
    with watching(json=as_json, quiet=quiet, told=wanted.warnings) as watcher:
        decided = plan_sweep(wanted, settings, out=out, scratch=scratch, listener=watcher)
        with logged(event_log, watcher, decided.checkpoints) as listener:
            run_planned(decided, out, settings, listener=listener, told=told)


def show_results(results: Sequence[Result], keep: Keep) -> None:
    """The leaderboard on standard output, the best first; nothing where nothing was scored."""
    from distmerge.cli.tables import console, table
    from distmerge.sweeps.results import leaderboard

    columns, rows = leaderboard(results, keep)
    if rows:
        console().print(table("Leaderboard", columns, rows))
