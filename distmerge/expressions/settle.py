"""Rounds over the blocks of several keys, until every block has a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from distmerge.expressions.compute_pool import ComputePool
from distmerge.expressions.evaluate import ReadBlock
from distmerge.methods.blocks import Grid


class InRounds(Protocol):
    """What is settled: an `Evaluation`, or several of one key side by side."""

    @property
    def grid(self) -> Grid: ...
    @property
    def direct(self) -> bool: ...
    @property
    def sampled(self) -> range: ...
    def sample(self, index: int, read: ReadBlock) -> None: ...
    def use_sample(self) -> None: ...
    def block(self, index: int, read: ReadBlock) -> Any: ...
    def advance(self) -> bool: ...


def settle(
    evaluations: Sequence[InRounds], reads: Sequence[ReadBlock], pool: ComputePool
) -> dict[int, Any]:
    """Ask whatever the programs need to ask until their blocks have results.

    Returns, by position among `evaluations`, the results of first blocks that were found on the
    way. Evaluations that wait for answers about the whole model end with those questions in
    their `model_partials`.
    """
    firsts: dict[int, Any] = {}
    still = [i for i, e in enumerate(evaluations) if not e.direct and len(e.grid)]
    sampling = [i for i in still if evaluations[i].sampled]
    pieces = [(i, b) for i in sampling for b in evaluations[i].sampled]
    pool.map(lambda at: evaluations[at[0]].sample(at[1], reads[at[0]]), pieces)
    for i in sampling:
        evaluations[i].use_sample()
    while still:
        found = pool.map(lambda i: evaluations[i].block(0, reads[i]), still)
        firsts.update({i: v for i, v in zip(still, found, strict=True) if v is not None})
        asking = [i for i, value in zip(still, found, strict=True) if value is None]
        rest = [(i, b) for i in asking for b in range(1, len(evaluations[i].grid))]
        pool.map(lambda at: evaluations[at[0]].block(at[1], reads[at[0]]), rest)
        progress = pool.map(lambda i: evaluations[i].advance(), asking)
        still = [i for i, worth_while in zip(asking, progress, strict=True) if worth_while]
    return firsts
