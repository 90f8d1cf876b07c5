"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class EngineName(StrEnum):
    """Where units run."""

    local = "local"
    ray = "ray"


class DeviceName(StrEnum):
    """What computes."""

    cpu = "cpu"
    cuda = "cuda"


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or - for standard input.")
]
Engine = Annotated[EngineName, typer.Option(help="In this process, or on Ray.")]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join: auto, or ray://HOST:PORT. One is started if absent."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Threads (local) or actors (Ray). Default: usable cores; on a cluster that is joined, "
        "as many as have work, on nodes that come later too.",
    ),
]
AllowedMem = Annotated[
    str, typer.Option(metavar="SIZE", help="Per worker process, Python and torch included.")
]
MaxShardSize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Of one output file, such as 5GB.")
]
OutDtype = Annotated[
    str | None, typer.Option(metavar="DTYPE", help="Written instead of the recipe's or base's.")
]
Device = Annotated[DeviceName, typer.Option(help="What computes.")]
Seed = Annotated[
    int | None, typer.Option(min=0, help="For random methods, instead of the recipe's.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is published at OUT.")]
KeepIntermediates = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", help="Write the recipe's named documents too, each below this place."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change the recipe: parameters.weight=0.4. Repeatable."
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="What has no effect in the recipe is an error.")
]
AllowNonFinite = Annotated[
    bool, typer.Option("--allow-non-finite", help="Write NaN and infinity too.")
]
ScratchFolder = Annotated[
    str | None,
    typer.Option(
        "--scratch",
        metavar="DIR",
        help="Remote inputs are kept there while they are needed, or 'none'. Default: in OUT.",
    ),
]
ScratchSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="The most that is kept there. Default: what is free."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only warnings and errors.")]
AsEvents = Annotated[bool, typer.Option("--json", help="Events on stdout, one JSON object a line.")]
EventLog = Annotated[
    str | None,
    typer.Option("--event-log", metavar="FILE", help="Append --json's lines to a file."),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Trace = Annotated[bool, typer.Option("--trace", help="Show where an error was raised.")]
