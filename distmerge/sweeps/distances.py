"""How far a candidate is from each of its parents: ||candidate - parent|| / ||parent||, over all
floating-point tensors that both have in the same shape; a group of tensors in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from distmerge.expressions.nodes import Branch, Leaf, Renumber, Stack, leaves, walk
from distmerge.plan.memory import MiB
from distmerge.plan.plan import Plan
from distmerge.run.collect import collect

GROUP = 64 * MiB
"""Bytes of tensors that are compared together."""
_PIECE = 1 << 20
"""Elements that are compared at a time."""
Tensors = Callable[[list[str]], Mapping[str, Tensor]]


def distances(plan: Plan, candidate: Tensors, merging: int) -> dict[str, float]:
    """The relative L2 distance from each parent, by its name; none for a candidate that is put
    together from parts, whose layers are not its parents' layers.

    candidate: the candidate's tensors of these names.
    merging: bytes that reading may use.
    """
    nodes = list(walk(plan.request.root))
    if any(isinstance(node, Renumber | Stack | Branch) for node in nodes):
        return {}
    parents = [leaf for leaf in dict.fromkeys(leaves(plan.request.root)) if isinstance(leaf, Leaf)]
    known = [set(plan.inputs.tensors[plan.inputs.leaves.index(leaf)]) for leaf in parents]
    apart, size = [0.0] * len(parents), [0.0] * len(parents)
    for keys in _groups(plan):
        own = candidate(keys)
        for i, parent in enumerate(parents):
            common = [key for key in keys if key in known[i] and own[key].is_floating_point()]
            request = replace(plan.request, root=parent, out_dtype=None)
            theirs = collect(request, common, allowed_mem=merging) if common else {}
            for key in common:
                if own[key].shape == theirs[key].shape:
                    more = _squares(own[key], theirs[key])
                    apart[i], size[i] = apart[i] + more[0], size[i] + more[1]
    return {
        str(parent): math.sqrt(apart[i] / size[i]) for i, parent in enumerate(parents) if size[i]
    }


def comparing_bytes(plan: Plan) -> int:
    """Memory that comparing takes: the candidate's and a parent's group, each twice as it is
    read."""
    return 4 * max(min(GROUP, plan.nbytes), 2 * max(plan.sizes.values()))


def _groups(plan: Plan) -> Iterator[list[str]]:
    group: list[str] = []
    room = GROUP
    for key, size in plan.sizes.items():
        if group and size > room:
            yield group
            group, room = [], GROUP
        group.append(key)
        room -= size
    if group:
        yield group


def _squares(own: Tensor, other: Tensor) -> tuple[float, float]:
    """Sums of squares of the difference and of the other, in float64."""
    apart = size = 0.0
    flat = (own.detach().reshape(-1), other.reshape(-1))
    for start in range(0, len(flat[1]), _PIECE):
        a, b = (one[start : start + _PIECE].to(torch.float64) for one in flat)
        apart += float((a - b).square().sum())
        size += float(b.square().sum())
    return apart, size
