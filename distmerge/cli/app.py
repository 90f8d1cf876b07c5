"""The commands, put together."""

from __future__ import annotations

import atexit
import gc
from pathlib import Path
from typing import Annotated

import typer

from distmerge.cli import describing, explaining, looking, merging, options, searching, sweeping
from distmerge.cli.failures import reported, to_the_end
from distmerge.cli.mergekit_flags import MergekitCommand

app = typer.Typer(
    name="distmerge",
    help="Merge model checkpoints by streaming, on one machine or on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its help takes longer to import than everything else here
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"distmerge {version('distmerge')}")
        except PackageNotFoundError:
            print("distmerge, run from its source folder")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Merge model checkpoints by streaming, on one machine or on Ray."""


@reported
def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Where models and merges go.")
    ] = Path("distmerge-demo"),
    trace: options.Trace = False,
) -> None:
    """Train three small models and merge them."""
    from distmerge.demo.walkthrough import run

    run(folder)


app.command(cls=MergekitCommand)(merging.merge)
for command in (
    merging.plan,
    sweeping.sweep,
    searching.search,
    explaining.explain,
    looking.inspect,
    looking.verify,
    looking.clean,
    describing.methods,
):
    app.command()(command)
app.command()(demo)


def main() -> None:
    """The `distmerge` script."""
    # Importing torch makes a million objects that stay: with Python's defaults the collector
    # walks them over and over, a tenth of the start-up.
    gc.set_threshold(100_000, 50, 100)
    atexit.register(gc.freeze)  # it would walk them once more at the end, which takes half a second
    with to_the_end():
        app(prog_name="distmerge")
