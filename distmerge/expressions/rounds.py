"""What passes over a key's blocks in rounds: how it is asked, and what it says of a round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from distmerge.methods.blocks import Grid

Span = tuple[int, int]
ReadBlock = Callable[[int, Span], Tensor]
"""A leaf's elements in a span, flat, in any dtype; the evaluation never writes to them."""
SAMPLE = -1
"""Stands for a block's index while a sample is looked at."""
PEEK = -2
"""The same while it is only found out whether anything is asked."""


class Begun(NamedTuple):
    """How a round began."""

    settled: bool
    """Has every block a result?"""
    first: Any = None
    """That of block 0, if it was found on the way."""
    ask: range = range(0)
    """Otherwise, the blocks that are still to be asked."""


class InRounds(Protocol):
    """What is settled: an `Evaluation`, or several of one key side by side."""

    @property
    def grid(self) -> Grid: ...
    @property
    def direct(self) -> bool: ...
    @property
    def sampled(self) -> range: ...
    def sample_span(self, index: int) -> Span: ...
    def sample(self, index: int, read: ReadBlock) -> bool: ...
    def use_sample(self) -> None: ...
    def begin_round(self, read: ReadBlock) -> Begun: ...
    def block(self, index: int, read: ReadBlock) -> Any: ...
    def advance(self) -> bool: ...
