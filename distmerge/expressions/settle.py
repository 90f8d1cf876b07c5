"""Rounds over the blocks of several keys, until every block has a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distmerge.expressions.compute_pool import ComputePool
from distmerge.expressions.rounds import InRounds, ReadBlock


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
    # One block first: there are questions that have no use of a sample.
    of_use = pool.map(
        lambda i: evaluations[i].sample(evaluations[i].sampled[0], reads[i]), sampling
    )
    pieces = [
        (i, b)
        for i, useful in zip(sampling, of_use, strict=True)
        if useful
        for b in evaluations[i].sampled[1:]
    ]
    pool.map(lambda at: evaluations[at[0]].sample(at[1], reads[at[0]]), pieces)
    for i in sampling:
        evaluations[i].use_sample()
    while still:
        begun = pool.map(lambda i: evaluations[i].begin_round(reads[i]), still)
        rounds = dict(zip(still, begun, strict=True))
        firsts.update({i: one.first for i, one in rounds.items() if one.first is not None})
        asking = [i for i in still if not rounds[i].settled]
        rest = [(i, b) for i in asking for b in rounds[i].ask]
        pool.map(lambda at: evaluations[at[0]].block(at[1], reads[at[0]]), rest)
        progress = pool.map(lambda i: evaluations[i].advance(), asking)
        still = [i for i, worth_while in zip(asking, progress, strict=True) if worth_while]
    return firsts
