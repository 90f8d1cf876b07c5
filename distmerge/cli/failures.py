"""The boundary between an exception and what a person at a shell sees of it."""

from __future__ import annotations

import errno
import functools
import os
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TextIO, TypeVar

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
        trace = bool(options.get("trace"))
        try:
            _check_here()
            return command(*args, **options)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            _tell("Interrupted. The same command goes on from what is finished.")
            raise typer.Exit(INTERRUPTED) from None
        except DistmergeError as error:
            _tell(str(error), trace=trace)
            raise typer.Exit(BAD_INPUT) from None
        except Exception as error:
            number = error.errno if isinstance(error, OSError) else None
            if number == errno.EPIPE or (number == errno.ENOSPC and _is_full(sys.stdout)):
                raise  # see `to_the_end`
            if number == errno.ENOSPC:
                text = f"No room is left on a disk that was written to: {shown(str(error))}."
                _tell(f"{text}\nFix: free some, then run the same command again", trace=trace)
                raise typer.Exit(BAD_INPUT) from None
            first = (str(error).strip().splitlines() or ["no message"])[0]
            text = f"{type(error).__name__}: {shown(first)}\nFix: --trace shows where it was raised"
            _tell(text, trace=trace)
            raise typer.Exit(BROKEN) from None

    return run


def _is_full(stream: TextIO) -> bool:
    """Has it no room? Terminals and pipes always have, files while their disk does."""
    try:
        number = stream.fileno()
    except OSError:  # it isn't a file's
        return False
    found = os.fstat(number)
    if stat.S_ISREG(found.st_mode):
        return os.fstatvfs(number).f_bavail == 0
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 7)  # /dev/full


def _check_here() -> None:
    """Raises OutputError where paths mean nothing, and torch's libraries end the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise OutputError(
            "The folder that this command is run in was deleted.", fix="cd to one that is there"
        ) from None


@contextmanager
def to_the_end() -> Iterator[None]:
    """Around all commands: standard output is written, and a second interrupt ends it at once."""
    # Prints to a closed stream go nowhere, and no other file gets its number.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        try:
            yield
        except SystemExit as ended:
            if ended.code == INTERRUPTED:  # Python waits for threads now
                signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
            raise
        finally:
            sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # whoever read our output has seen enough
            raise SystemExit(BROKEN) from None
        fix = "send it to a place with room"
        _tell(f"Standard output can't be written: {error.strerror}.\nFix: {fix}")
        raise SystemExit(BAD_INPUT) from None


def _tell(text: str, *, trace: bool = False) -> None:
    if trace:
        traceback.print_exc(file=sys.stderr)
    print(printable(text), file=sys.stderr, flush=True)
