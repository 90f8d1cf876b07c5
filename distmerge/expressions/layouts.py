"""Models that hold the same tensors fused in one and apart in the other, brought to the base's.

transformers' own conversion mapping says which tensors are which. What it merely joins or cuts is
presented by views, or read from a part of the tensor's bytes; the rest is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from distmerge.checkpoints.layout import listed
from distmerge.checkpoints.tensors import DTYPE_BYTES, TensorInfo
from distmerge.checkpoints.views import Joined, Slice, View, as_view
from distmerge.errors import KeyMismatch

Held = TensorInfo | View


@dataclass
class Bridged:
    """One model's tensors under the base's keys."""

    tensors: dict[str, Any]
    used: dict[str, str] = field(default_factory=dict)
    """Keys that are read as parts of others, or hold them -> which."""


def bridge(
    base: Mapping[str, Any],
    other: Mapping[str, Any],
    configs: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None],
    name: str,
) -> Bridged:
    """The other model's tensors, those that it holds in another layout in the base's.

    Nothing is done, and transformers isn't asked, unless each lacks keys of the other.

    Raises
        KeyMismatch: the layouts differ by more than joining and cutting.
    """
    lacking = [key for key in base if key not in other]
    extra = {key: one for key, one in other.items() if key not in base}
    known = [config for config in configs if config and config.get("model_type")]
    found = Bridged(dict(other))
    in_files = all(isinstance(one, Held) for one in extra.values())
    if not lacking or not extra or not known or not in_files:
        return found
    from distmerge.huggingface.layouts import fusions  # a door upward

    wanted, obstacles = set(lacking), []
    for fusion in fusions(known[0], [*lacking, *extra]):
        one, many = fusion.one, fusion.many
        if one in wanted and all(key in extra for key in many):
            if not fusion.obstacle and (made := _joined(base[one], [extra[k] for k in many])):
                _take(found, {one: made}, dict.fromkeys(many, f"read as a part of {one}"))
            else:
                obstacles.append(f"{one}: {fusion.obstacle or 'other shapes'}")
        elif one in extra and all(key in wanted for key in many):
            cut = None if fusion.obstacle else _cut(extra[one], [base[key] for key in many])
            if cut is None:
                obstacles.append(f"{one}: {fusion.obstacle or 'other shapes'}")
            else:
                what = {one: f"read as {listed(list(many))}"}
                _take(found, dict(zip(many, cut, strict=True)), what)
    if obstacles:
        raise KeyMismatch(
            f"{name} is saved in another layout than the base, which can't be bridged by joining "
            "and cutting tensors.",
            *obstacles[:5],
            fix=f"load {name} and the base with one version of transformers, save_pretrained() "
            "both, and merge these",
        )
    return found


def _take(found: Bridged, made: Mapping[str, Held], used: Mapping[str, str]) -> None:
    for key in used:
        found.tensors.pop(key, None)
    found.tensors |= made
    found.used |= used


def _joined(like: Any, members: list[Held]) -> View | None:
    """The members one behind the other, in the shape of the base's tensor."""
    shape = tuple(like.shape)
    total = sum(member.elements for member in members)
    across = {member.shape[-1] for member in members if member.shape}
    if total != _elements(shape) or across != {shape[-1]}:
        return None
    return Joined(members[0].dtype, shape, tuple(map(as_view, members)))


def _cut(whole: Held, likes: list[Any]) -> list[Held] | None:
    """Pieces of a tensor, one behind the other, in the shapes of the base's."""
    shapes = [tuple(like.shape) for like in likes]
    if whole.elements != sum(map(_elements, shapes)) or {s[-1] for s in shapes} != {
        whole.shape[-1]
    }:
        return None
    pieces: list[Held] = []
    at = 0
    for shape in shapes:
        pieces.append(_piece(whole, at, shape))
        at += _elements(shape)
    return pieces


def _piece(whole: Held, at: int, shape: tuple[int, ...]) -> Held:
    if isinstance(whole, TensorInfo) and whole.strides is None:
        item, count = DTYPE_BYTES[whole.dtype], _elements(shape)
        start = whole.start + at * item
        return replace(whole, shape=shape, start=start, stop=start + count * item)
    return Slice(whole.dtype, shape, as_view(whole), at)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
