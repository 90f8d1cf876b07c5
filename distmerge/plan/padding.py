"""Embeddings with more rows than there are tokens, streamed: what fills the rows is asked for.

A view could give the mean of a matrix's rows only by making it whole. So the plan reads the matrix
with those rows empty, and has a step of its own fill them; its question is answered in one more
pass over the matrix, block by block as all questions are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distmerge.checkpoints.row_map import Padded
from distmerge.expressions.program import Call, Program, Read, Same, Step, moved
from distmerge.methods.padding import with_mean_rows


def filled(program: Program, given: Mapping[int, Any]) -> tuple[Program, dict[int, Any]]:
    """A key's program and inputs, with padded inputs read unfilled and filled by a step."""
    padded = {leaf: one for leaf, one in given.items() if isinstance(one, Padded)}
    if not padded or isinstance(program.steps[0], Same):
        return program, dict(given)
    steps: list[Step] = []
    new: dict[int, int] = {}
    for place, step in enumerate(program.steps):
        steps.append(moved(step, new))
        if isinstance(step, Read) and step.leaf in padded:
            steps.append(_call(step.leaf, len(steps) - 1, padded[step.leaf].inner.shape[0]))
        new[place] = len(steps) - 1
    inputs = {leaf: padded[leaf].unfilled if leaf in padded else one for leaf, one in given.items()}
    return Program(program.key, tuple(steps), program.leaves), inputs


def _call(leaf: int, read: int, known: int) -> Call:
    # Numbered apart from the expression's own nodes, which count from 0.
    node = -1 - leaf
    return Call(node, with_mean_rows, (("models", (read,)),), None, None, {"known": known})
