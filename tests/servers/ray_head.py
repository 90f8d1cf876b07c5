"""The boundary between a test and a Ray head with a dashboard, which takes jobs and has metrics.

What is in its environment, its workers and jobs have in theirs, as on a machine with a role.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
STARTS_WITHIN = 180.0
"""Seconds, on a busy machine."""


class RayHead:
    """A node with some cores, as `ray start --head` makes it."""

    def __init__(self, environment: Mapping[str, str], cores: int = 2) -> None:
        self._environment = {**os.environ, **environment}
        self._cores = cores
        self.sessions = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
        """Ray's own folder: logs, jobs' files. Sockets are in there, whose names must be short."""
        self.url = f"http://127.0.0.1:{_free_port()}"
        self.metrics_url = f"http://127.0.0.1:{_free_port()}/metrics"
        self._agent_port = _free_port()
        """Where jobs are handed on to. Left alone it is the same for every Ray on a machine: the
        second one's agent lives without it, and no job is taken."""

    def __enter__(self) -> Self:
        dashboard, metrics = (u.split(":")[2].split("/")[0] for u in (self.url, self.metrics_url))
        options = ["--port=0", f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}"]
        options += [f"--dashboard-agent-listen-port={self._agent_port}"]
        options += [f"--num-cpus={self._cores}", f"--object-store-memory={80 << 20}"]
        self._process = subprocess.Popen(
            [*_RAY, "start", "--head", "--block", f"--temp-dir={self.sessions}", *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._environment,
            start_new_session=True,
        )
        try:
            self._until_it_answers()
        except BaseException:
            self._stop()
            raise
        return self

    def _until_it_answers(self) -> None:
        last = time.monotonic() + STARTS_WITHIN
        while True:
            try:
                self.get("/api/jobs/")
                self.metrics("any")  # which its agent tells, a process of its own
                socket.create_connection(("127.0.0.1", self._agent_port), 1).close()
                return
            except OSError:
                assert self._process.poll() is None, "the head ended"
                assert time.monotonic() < last, "the head doesn't answer"
                time.sleep(0.2)

    def __exit__(self, *error: object) -> None:
        self._stop()
        shutil.rmtree(self.sessions, ignore_errors=True)

    def _stop(self) -> None:
        self._process.terminate()  # it then ends what it has started
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def submit(self, folder: Path, *command: str) -> subprocess.Popen[str]:
        """`ray job submit` of a folder and a command; it ends with the job, and prints its log."""
        submit = ["job", "submit", "--address", self.url, "--working-dir", str(folder)]
        return subprocess.Popen(
            [*_RAY, *submit, "--", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def arguments(self) -> set[str]:
        """Of every process that the head has started, a job's and its workers' included."""
        found = set()
        with suppress(psutil.Error):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    found.add(" ".join(process.cmdline()))
        return found

    def get(self, path: str) -> Any:
        """What the dashboard answers."""
        with urllib.request.urlopen(self.url + path, timeout=30) as reply:
            return json.load(reply)

    def metrics(self, name: str) -> dict[str, float]:
        """A metric's values, summed up by the tag `node`."""
        with urllib.request.urlopen(self.metrics_url, timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line.startswith(f"{name}{{"):
                node = line.split('node="')[1].split('"')[0]
                found[node] = found.get(node, 0.0) + float(line.rpartition(" ")[2])
        return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
