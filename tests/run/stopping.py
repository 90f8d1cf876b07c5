"""The boundary between a test and a merge that kills itself just before one chosen call.

Each run is a process of its own, forked from a server that has imported what it needs.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

from distmerge.write import (
    fsspec_output,
    hub_output,
    hub_repository,
    local_output,
    s3_upload,
)

CLASSES = {
    "LocalOutput": local_output.LocalOutput,
    "PendingLocalFile": local_output.PendingLocalFile,
    "FsspecOutput": fsspec_output.FsspecOutput,
    "PendingUpload": s3_upload.PendingUpload,
    "HubOutput": hub_output.HubOutput,
    "HubRepository": hub_repository.HubRepository,
}
PROCESSES = multiprocessing.get_context("forkserver")
get_temp_dir()  # its sockets' folder, for good, before a test points temporary files somewhere long
PROCESSES.set_forkserver_preload(["run.stopping", "distmerge.cli.app", "distmerge.run.merge"])


def run_until(
    call: str, path: str, nth: int, marker: Path, work: Callable[..., None], *args: Any
) -> int:
    """Do some work in a process, and SIGKILL that before its nth call of a method
    (`LocalOutput.write_bytes`) on a path that fits a pattern. Its exit code; `marker` is written
    if it got there.
    """
    process = PROCESSES.Process(
        target=_run, args=(call, path, nth, marker, work, args, dict(os.environ))
    )
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(
    call: str,
    path: str,
    nth: int,
    marker: Path,
    work: Callable[..., None],
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)  # the server's is of when it was started
    tempfile.tempdir = None
    _stop_at(call, path, nth, marker)
    work(*args)


def command(*arguments: str) -> None:
    """The command line, with these arguments."""
    from distmerge.cli.app import main

    sys.argv = ["distmerge", *arguments, "--quiet"]
    main()


def merge(what: Any, out: str, options: dict[str, Any]) -> None:
    """`distmerge.merge`, for another process."""
    import distmerge

    distmerge.merge(what, out, **options)


def _stop_at(call: str, path: str, nth: int, marker: Path) -> None:
    """Replace a method by one that kills the process at its nth fitting call."""
    name, method = call.split(".")
    original = getattr(CLASSES[name], method)
    seen = 0

    def stopping(self: Any, *args: Any, **named: Any) -> Any:
        nonlocal seen
        pending = getattr(self, "_path", None) or getattr(self, "_place", None)
        place = pending if name.startswith("Pending") else args[0]
        seen += re.search(path, place) is not None
        if seen == nth:
            marker.write_text(place)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **named)

    setattr(CLASSES[name], method, stopping)
