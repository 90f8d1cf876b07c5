"""`distmerge merge` and `distmerge plan`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distmerge.cli import options
from distmerge.cli.failures import reported
from distmerge.errors import OutputError
from distmerge.run.progress import printable, watching

if TYPE_CHECKING:
    from distmerge.expressions.request import MergeRequest
    from distmerge.plan.plan import Plan
    from distmerge.sweeps.plan import SweepPlan

ALLOWED_MEM = "2GiB"


@reported
def merge(
    recipe: options.RecipeArgument,
    out: Annotated[str, typer.Argument(metavar="OUT", help="A directory or URL to write to.")],
    engine: options.Engine = options.EngineName.local,
    address: options.Address = None,
    workers: options.Workers = None,
    allowed_mem: options.AllowedMem = ALLOWED_MEM,
    max_shard_size: options.MaxShardSize = None,
    out_dtype: options.OutDtype = None,
    device: options.Device = options.DeviceName.cpu,
    seed: options.Seed = None,
    overwrite: options.Overwrite = False,
    allow_non_finite: options.AllowNonFinite = False,
    pull_request: Annotated[
        bool, typer.Option("--pr", help="On the Hub: open a pull request with the result.")
    ] = False,
    keep_intermediates: options.KeepIntermediates = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, write nothing.")
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.AsEvents = False,
    event_log: options.EventLog = None,
    overrides: options.Overrides = None,
    strict: options.Strict = False,
    trace: options.Trace = False,
) -> None:
    """Merge models as a recipe says, and write the result."""
    from distmerge.run import merge as running
    from distmerge.run.log_file import logged

    check_lasting(out, keep_intermediates)
    request = read_request(recipe, overrides, strict=strict)
    settings: dict[str, Any] = {
        "engine": engine.value,
        "workers": workers,
        "allowed_mem": allowed_mem,
        "max_shard_size": max_shard_size,
        "out_dtype": out_dtype,
        "device": device.value,
        "seed": seed,
        "overwrite": overwrite,
        "pull_request": pull_request,
    }
    warn_of_plan(decided := running.plan(request, out, **settings), request)
    if dry_run:
        return show_plan(decided, as_json=as_json)
    with (
        watching(json=as_json, quiet=quiet, told=decided.request.warnings) as watcher,
        logged(event_log, watcher, decided.checkpoints) as listener,
    ):
        running.merge(
            decided,
            out,
            listener=listener,
            address=address,
            allow_non_finite=allow_non_finite,
            keep_intermediates=keep_intermediates,
            **settings,
        )


@reported
def plan(
    recipe: options.RecipeArgument,
    out: Annotated[
        str | None, typer.Argument(metavar="[OUT]", help="Also check that it can be written here.")
    ] = None,
    engine: options.Engine = options.EngineName.local,
    workers: options.Workers = None,
    allowed_mem: options.AllowedMem = ALLOWED_MEM,
    max_shard_size: options.MaxShardSize = None,
    out_dtype: options.OutDtype = None,
    device: options.Device = options.DeviceName.cpu,
    seed: options.Seed = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    overrides: options.Overrides = None,
    strict: options.Strict = False,
    trace: options.Trace = False,
) -> None:
    """Show what a merge would do, from headers."""
    from distmerge.run import merge as running

    check_lasting(out)
    request = read_request(recipe, overrides, strict=strict)
    decided = running.plan(
        request,
        out,
        engine=engine.value,
        workers=workers,
        allowed_mem=allowed_mem,
        max_shard_size=max_shard_size,
        out_dtype=out_dtype,
        device=device.value,
        seed=seed,
        overwrite=overwrite,
    )
    warn_of_plan(decided, request)
    show_plan(decided, as_json=as_json)


def check_lasting(*places: str | None) -> None:
    """Raises OutputError: what is written there ends with this process."""
    for place in places:
        if place is not None and place.startswith("memory:"):
            raise OutputError(
                f"{place} is in the memory of this command, and gone when it ends.",
                fix="name a folder or the URL of a store",
            )


def read_request(recipe: str, overrides: list[str] | None, *, strict: bool) -> MergeRequest:
    """Load a recipe and open its models; warnings are told on the way."""
    from distmerge.expressions.recipe import load_recipe

    loaded = load_recipe(recipe, overrides=overrides or (), strict=strict)
    # A key that has no effect is often why the models then don't fit, so these come first.
    for text in loaded.warnings:
        warn(text)
    request = loaded.request()
    for text in request.warnings[len(loaded.warnings) :]:
        warn(text)
    return replace(request, strict=strict)


def warn_of_plan(decided: Plan, request: MergeRequest) -> None:
    """Tell what only the plan showed."""
    for text in decided.request.warnings[len(request.warnings) :]:
        warn(text)


def warn(text: str) -> None:
    """Tell a person of something that has no effect, or another than it seems."""
    print(printable(f"Warning: {text}"), file=sys.stderr, flush=True)


def show_plan(decided: Plan | SweepPlan, *, as_json: bool) -> None:
    """On standard output."""
    if as_json:
        print(json.dumps(decided.to_json(), indent=2, ensure_ascii=False))
        return
    from distmerge.cli.tables import console

    for table in decided.tables():
        console().print(table)
