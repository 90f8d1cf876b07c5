"""The boundary between a test and a node of a Ray cluster that has a disk of its own.

The node lives in a mount namespace, where a folder of this machine is another one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

JOINS_WITHIN = 180.0
"""Seconds, on a busy machine."""


@contextmanager
def machine_with_disk(address: str, folder: Path, disk: Path) -> Iterator[None]:
    """A second node, of one core, joins the cluster; its processes see `disk` as `folder`."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={address}"]
    ray += ["--num-cpus=1", f"--object-store-memory={80 << 20}"]
    # Nothing is mounted on top of what the processes outside see.
    apart = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", _MOUNT_AND_RUN, "sh"]
    node = subprocess.Popen(
        [*apart, str(disk), str(folder), *ray],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _until_it_has_joined(address)
        yield
    finally:
        node.terminate()
        try:
            node.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


_MOUNT_AND_RUN = 'mount --bind "$1" "$2"; shift 2; exec "$@"'


_WAIT = """
import ray, sys, time
ray.init(address=sys.argv[1], log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.1)
"""


def _until_it_has_joined(address: str) -> None:
    subprocess.run([sys.executable, "-c", _WAIT, address], check=True, timeout=JOINS_WITHIN)
