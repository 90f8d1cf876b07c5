"""The boundary between an exception and what a person at a shell sees of it."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from distmerge.errors import DistmergeError, OutputError, shown
from distmerge.run.progress import printable

P = ParamSpec("P")
R = TypeVar("R")

BROKEN, BAD_INPUT, INTERRUPTED = 1, 2, 130
"""Exit codes besides 0."""


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """The command with its failures told on stderr and turned into exit codes.

    An error of ours is its own text; any other is one line, which asks for `--trace`, the option
    that shows where it was raised.
    """

    @functools.wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> R:
        try:
            _check_here()
            return command(*args, **options)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            _tell("Interrupted. The same command goes on from what is finished.")
            raise typer.Exit(INTERRUPTED) from None
        except DistmergeError as error:
            _tell(str(error), trace=bool(options.get("trace")))
            raise typer.Exit(BAD_INPUT) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # whoever read our output has seen enough
            first = (str(error).strip().splitlines() or ["no message"])[0]
            text = f"{type(error).__name__}: {shown(first)}\nFix: --trace shows where it was raised"
            _tell(text, trace=bool(options.get("trace")))
            raise typer.Exit(BROKEN) from None

    return run


def _check_here() -> None:
    """Raises OutputError where paths mean nothing, and torch's libraries end the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise OutputError(
            "The folder that this command is run in was deleted.", fix="cd to one that is there"
        ) from None


def _tell(text: str, *, trace: bool = False) -> None:
    if trace:
        traceback.print_exc(file=sys.stderr)
    print(printable(text), file=sys.stderr, flush=True)
