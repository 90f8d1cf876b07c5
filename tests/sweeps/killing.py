"""A command that is killed while its evaluator, `judging.slow`, looks at the third candidate."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


def kill_at_the_third_call(command: Sequence[str | Path], folder: Path) -> dict[str, str]:
    """Run it until then, and let the evaluator go on from the next time; the environment that the
    command needs. What was called is told in `folder`."""
    environment = {**os.environ, "JUDGING": str(folder)}
    running = subprocess.Popen(command, env=environment)
    calls = folder / "calls"
    until = time.monotonic() + 300
    while not (calls.exists() and calls.stat().st_size == 3):
        assert running.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    (folder / "go").touch()
    return environment
