"""The boundary between a test and a Ray cluster of several raylets on this machine.

The cluster lives in a process of its own, which ends it when its standard input ends: the test's
process may have a Ray of its own, and a killed test run leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS_FOLDER = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Node:
    """One raylet."""

    id: str
    pid: int
    """Of the raylet."""


class RayNodes:
    """A head with one core; each added node brings another."""

    def __init__(self, nodes: int, environment: Mapping[str, str] | None = None) -> None:
        path = os.pathsep.join(filter(None, [str(TESTS_FOLDER), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "servers.ray_nodes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
            env={**os.environ, **(environment or {}), "PYTHONPATH": path},
        )
        self.nodes = [self.add() for _ in range(nodes)]

    def add(self, **environment: str) -> Node:
        """Start a node, with these environment variables; the first one is the head."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(environment), file=self._process.stdin, flush=True)
        said = json.loads(self._process.stdout.readline())
        self.address: str = said["address"]
        return Node(said["id"], said["pid"])

    def stop(self) -> None:
        """End all nodes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            self._process.wait()


def serve() -> None:
    """In the child: a node for every line, until there are no more."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for line in sys.stdin:
        given: dict[str, Any] = {"env_vars": json.loads(line)} if len(line) > 3 else {}
        if cluster.head_node is None:
            given |= {"include_dashboard": False}
        node = cluster.add_node(object_store_memory=80 << 20, **given)
        pid = node.all_processes["raylet"][0].process.pid
        told = {"address": cluster.address, "id": node.node_id, "pid": pid}
        print(json.dumps(told), file=replies, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    serve()
