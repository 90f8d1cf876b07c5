"""What a worker lends to the units that it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from distmerge.expressions.compute_pool import ComputePool
from distmerge.expressions.evaluate import Place
from distmerge.methods.random import REMEMBERED
from distmerge.run.fetch import Fetcher


@dataclass
class UnitContext:
    """Its memory, threads and settings."""

    fetcher: Fetcher
    arena_size: int
    group: int
    """Bytes of raw inputs that are read together, if the arena has the room."""
    gathered: int
    """Bytes planned for methods that see whole tensors."""
    pool: ComputePool
    prefetcher: ThreadPoolExecutor
    """One thread, which stays one window ahead."""
    seed: int
    device: str = "cpu"
    allow_non_finite: bool = False
    model_answers: Mapping[Place, Any] = field(default_factory=dict)
    on_bytes: Callable[[int, int], None] = lambda read, written: None
    remembered: int = REMEMBERED
    """Bytes of what was drawn for a key that rounds may hand on to the next."""
