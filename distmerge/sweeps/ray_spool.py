"""The other half of `scratch.py`: a spool on each further node of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distmerge.checkpoints import spool
from distmerge.run.events import Event, Listener
from distmerge.run.options import MergeOptions
from distmerge.run.ray_cluster import join
from distmerge.sweeps.scoring import told
from distmerge.sweeps.scratch import Spool, free_bytes

_RAY: Any = ray  # these few functions of it have no types


@contextmanager
def elsewhere(wanted: Spool, settings: MergeOptions, listener: Listener) -> Iterator[None]:
    """Have the spool on all nodes, and Ray joined, while this lasts. A node where it can't be made,
    and one that comes later, reads from the store."""
    started = not _RAY.is_initialized()
    if started:
        join(settings.address, settings.processes)
    try:
        for failed in _on_each_node(lambda: _make(wanted)):
            text = f"Inputs are read again on a node of the cluster: {failed}"
            listener(Event("notice", {"text": text}))
        try:
            yield
        finally:
            _on_each_node(lambda: spool.remove(wanted.place))
    finally:
        if started:
            _RAY.shutdown()


def _make(wanted: Spool) -> None:
    limit = min(wanted.limit, free_bytes(wanted.place))
    spool.make(wanted.place, limit=limit, wanted=wanted.names).close()


def _on_each_node(work: Callable[[], None]) -> list[str]:
    """Run something on every node; what went wrong, in words."""
    tasks = []
    for node in _RAY.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            remote = _RAY.remote(num_cpus=0, scheduling_strategy=there)(work)
            tasks.append(remote.remote())
    failed = []
    for task in tasks:
        try:
            _RAY.get(task)
        except (_RAY.exceptions.RayError, OSError) as error:
            failed.append(told(error))
    return failed
