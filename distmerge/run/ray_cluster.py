"""The boundary between the Ray engine and the cluster: joining one, and what it has room for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from distmerge.errors import RecipeError
from distmerge.run.worker import WorkerSettings

GiB = 2**30
_RAY: Any = ray  # these few functions of it have no types


def join(address: str | None, workers: int) -> bool:
    """Join the cluster at an address, or start Ray here with room for so many workers. False if
    this process has joined one already: only who joined it is to leave it.

    Raises
        RecipeError: there is none, it doesn't let us in, or another one has been joined.
    """
    if ray.is_initialized():
        _check_joined(address)
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address is None:  # "local": Ray would otherwise join whatever cluster it finds here
        options |= {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RecipeError(
            f"Could not join the Ray cluster at {address or 'this machine'}.",
            str(error).splitlines()[0],
            fix="check --address, and RAY_AUTH_MODE and its token if the cluster asks for one",
        ) from error
    return True


def _check_joined(address: str | None) -> None:
    """Refuse to merge on another cluster than the one at an address, as far as that tells: it may
    be None, "auto" or a proxy's."""
    if address is None or "://" in address or ":" not in address:
        return
    joined = str(_RAY.get_runtime_context().gcs_address)
    if address.rpartition(":")[2] != joined.rpartition(":")[2]:  # hosts have several names
        raise RecipeError(
            f"This process has joined the Ray cluster at {joined}, not the one at {address}.",
            fix="ray.shutdown() first, or leave the address out",
        )


def this_node() -> str:
    """This machine's address, and the first digits of Ray's id for it."""
    node = _RAY.get_runtime_context().get_node_id()
    return f"{_RAY.util.get_node_ip_address()}/{node[:6]}"


def asked_for(settings: WorkerSettings) -> dict[str, float]:
    """What a worker asks of a node, in Ray's words: cores, bytes, and a GPU where it computes on
    one. Ray only counts the bytes; that they are kept is the memory plan's part."""
    asked: dict[str, float] = {"CPU": settings.threads, "memory": settings.memory.projected}
    return asked | ({"GPU": 1.0} if settings.device.startswith("cuda") else {})


def fits_somewhere(asked: Mapping[str, float]) -> bool:
    """Whether some node, with nothing else on it, has room for a worker."""
    nodes = [node["Resources"] for node in _RAY.nodes() if node["Alive"]]
    return any(all(node.get(k, 0.0) >= much for k, much in asked.items()) for node in nodes)


def described(asked: Mapping[str, float]) -> str:
    """`1 CPU, 1.2 GiB of memory`."""
    parts = [f"{asked['CPU']:g} CPU", f"{asked['memory'] / GiB:.1f} GiB of memory"]
    return ", ".join(parts + (["1 GPU"] if "GPU" in asked else []))
