"""`distmerge search`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from distmerge.cli import options
from distmerge.cli.failures import reported
from distmerge.cli.merging import ALLOWED_MEM, check_lasting
from distmerge.cli.sweeping import show_results
from distmerge.run.progress import watching


class SamplerName(StrEnum):
    """Optuna's, by short names."""

    tpe = "tpe"
    cmaes = "cmaes"
    random = "random"
    qmc = "qmc"


class PrunerName(StrEnum):
    """Optuna's, by short names."""

    none = "none"
    median = "median"
    halving = "halving"
    hyperband = "hyperband"


@reported
def search(
    space: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep with evaluate, or -.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="For results, study and what is kept.")],
    trials: Annotated[int, typer.Option(min=1, help="In all, earlier runs included.")] = 50,
    sampler: Annotated[SamplerName, typer.Option(help="What proposes.")] = SamplerName.tpe,
    pruner: Annotated[
        PrunerName, typer.Option(help="Ends trials whose evaluator yields worse scores.")
    ] = PrunerName.none,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Of Optuna's study. Default: a database in OUT."),
    ] = None,
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
    quiet: options.Quiet = False,
    as_json: options.AsEvents = False,
    event_log: options.EventLog = None,
    overrides: options.Overrides = None,
    strict: options.Strict = False,
    trace: options.Trace = False,
) -> None:
    """Search a sweep's space for the best merges."""
    from distmerge.run.log_file import logged
    from distmerge.sweeps.search import search as run

    check_lasting(out)
    told = (lambda results, by: None) if as_json or quiet else show_results
    with watching(json=as_json, quiet=quiet) as watcher, logged(event_log, watcher) as listener:
        run(
            space,
            out,
            trials=trials,
            sampler=sampler.value,
            pruner=pruner.value,
            storage=storage,
            scratch=scratch,
            scratch_size=scratch_size,
            told=told,
            listener=listener,
            engine=engine.value,
            address=address,
            workers=workers,
            allowed_mem=allowed_mem,
            max_shard_size=max_shard_size,
            out_dtype=out_dtype,
            device=device.value,
            seed=seed,
            overwrite=overwrite,
            overrides=overrides or (),
            strict=strict,
        )
