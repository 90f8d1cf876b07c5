"""The other half of `scratch.py`: a spool on each further node of a Ray cluster."""

from __future__ import annotations

import threading
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
LOOKS_EVERY = 1.0
"""Seconds between two looks for nodes that have joined."""


@contextmanager
def elsewhere(wanted: Spool, settings: MergeOptions, listener: Listener) -> Iterator[None]:
    """Have the spool on all nodes, also on those that join, and Ray joined, while this lasts. A
    node where it can't be made reads from the store."""
    started = join(settings.address, settings.processes)
    known: set[str] = set()

    def make() -> None:
        for failed in _on_each_node(lambda: _make(wanted), known):
            text = f"Inputs are read again on a node of the cluster: {failed}"
            listener(Event("notice", {"text": text}))

    try:
        make()
        try:
            with _repeated(make):
                yield
        finally:
            _on_each_node(lambda: spool.remove(wanted.place), set())
    finally:
        if started:
            _RAY.shutdown()


def _make(wanted: Spool) -> None:
    limit = min(wanted.limit, free_bytes(wanted.place))
    spool.make(wanted.place, limit=limit, wanted=wanted.names).close()


@contextmanager
def _repeated(work: Callable[[], None]) -> Iterator[None]:
    """Do something now and again in a thread while this lasts."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(LOOKS_EVERY):
            work()

    thread = threading.Thread(target=repeat, name="distmerge-nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _on_each_node(work: Callable[[], None], known: set[str]) -> list[str]:
    """Run something on every node that isn't known yet; what went wrong, in words."""
    tasks = []
    for node in _RAY.nodes():
        if node["Alive"] and node["NodeID"] not in known:
            known.add(node["NodeID"])
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
