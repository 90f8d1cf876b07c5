"""A block's result that a loop rounds as it makes it, so that float32 is never in memory.

Whoever writes results says that it takes them so; everybody else gets tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmerge.methods.fusion import flat

Array = np.ndarray[Any, Any]

_now = threading.local()


@dataclass(frozen=True, slots=True, eq=False)
class Unrounded:
    """Float32, not made yet."""

    shape: torch.Size
    make: Callable[[Any], None]
    """Given where to put it: a float32 array, or what else `rounding_kernels.put` takes."""
    held: Any = None
    """What has to live until then: loops are given some arrays by no more than their addresses."""

    def numel(self) -> int:
        """How many elements it has."""
        return self.shape.numel()

    def computed(self) -> Tensor:
        """It as a tensor."""
        out = torch.empty(self.shape)
        self.make(flat(out))
        return out

    def round(self, out: Array, base: Array | None) -> tuple[bool, int, int]:
        """Make it in bfloat16 bits; what `rounding_kernels.round_and_count` says of it, against
        the base's bits if there are any."""
        tally = np.zeros(3, np.int64)
        self.make((out, tally) if base is None else (out, base, tally))
        largest, changed, lost = tally.tolist()
        return largest < FINITE, changed, lost


FINITE = 0x7F7F8000
"""Bits of the smallest float32 magnitude that bfloat16 rounds to infinity."""


@contextmanager
def allow_unrounded(allowed: bool) -> Iterator[None]:
    """May results be left unrounded, in this thread? The innermost `with` decides."""
    before, _now.allowed = unrounded_allowed(), allowed
    try:
        yield
    finally:
        _now.allowed = before


def unrounded_allowed() -> bool:
    """Is whoever asked for a result content with `Unrounded`?"""
    return getattr(_now, "allowed", False)
