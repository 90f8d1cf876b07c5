"""A merge's numbers among Ray's own metrics, which each node of a cluster offers to Prometheus.

Without `ray[default]` no node has an agent that collects them, and they go nowhere.
"""

from __future__ import annotations

from typing import Literal

from ray.util.metrics import Counter

Name = Literal["bytes_read", "bytes_written", "units", "retries", "reruns", "stalls"]
_TOLD: dict[Name, str] = {
    "bytes_read": "Bytes of inputs that workers have read.",
    "bytes_written": "Bytes of tensors that workers have written.",
    "units": "Shards that are finished.",
    "retries": "Requests to stores that were made again after a failure.",
    "reruns": "Shards that lost their worker and are run again.",
    "stalls": "Times that a worker moved no byte for a minute.",
}


class Metrics:
    """Counters `distmerge_<name>`, tagged by node: the one that `worker` events name."""

    def __init__(self) -> None:
        self._counters = {
            name: Counter(f"distmerge_{name}", description=text, tag_keys=("node",))
            for name, text in _TOLD.items()
        }

    def add(self, name: Name, much: int, node: str) -> None:
        """Count so many more there."""
        if much > 0:  # Ray refuses zero
            self._counters[name].inc(much, tags={"node": node})
