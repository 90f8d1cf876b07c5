"""The leaves of an expression under one spelling of their keys: that of the base.

A leaf that is seen through moves (`Renumber`) is there once for each way in which it is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from distmerge.checkpoints.names import buffers, match_names
from distmerge.checkpoints.quantised import refuse_packed
from distmerge.checkpoints.spellings import OUTPUT, open_side, tied_to, ties, vocabulary
from distmerge.checkpoints.tensors import TensorInfo
from distmerge.checkpoints.views import View
from distmerge.errors import DtypeMismatch
from distmerge.expressions.layers import Path, in_layer_order, outer_key
from distmerge.expressions.layouts import bridge
from distmerge.expressions.nodes import (
    Expression,
    Leaf,
    Renumber,
    TensorLeaf,
    children,
    leaves,
)

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Skipped:
    """An input tensor that goes nowhere, and why."""

    model: str
    key: str
    reason: str


@dataclass(frozen=True)
class Inputs:
    """An expression's leaves, their tensors by output key."""

    leaves: Sequence[Leaf | TensorLeaf]
    tensors: Sequence[Mapping[str, TensorInfo | View | Tensor]]
    mappings: Sequence[str] = ()
    """Sentences: which names of which model were read as which."""
    skipped: Sequence[Skipped] = field(default=())
    own_keys: Sequence[Mapping[str, str]] = ()
    """For each leaf, output key -> its own spelling, where they differ."""
    paths: Sequence[Path] = ()
    """For each leaf, how it is seen from outside; empty where none is moved."""
    aligned: Mapping[Leaf | TensorLeaf, Mapping[str, str]] = field(default_factory=dict)
    """For each distinct leaf, every key under the base's spelling -> its own spelling, as long
    as nothing moves it."""

    @cached_property
    def keys(self) -> list[str]:
        """The ordered union of all keys, the base's first."""
        union = dict.fromkeys(key for tensors in self.tensors for key in tensors)
        return in_layer_order(union) if any(self.paths) else list(union)

    def spec(self, leaf: int, key: str) -> tuple[str, tuple[int, ...]]:
        """safetensors' dtype name and the shape of a tensor.

        Raises
            DtypeMismatch: it is no tensor, or of a dtype that can't be merged or copied.
        """
        found = self.tensors[leaf][key]
        try:
            return spec_of(found)
        except (KeyError, AttributeError):
            what = getattr(found, "dtype", type(found).__name__)
            raise DtypeMismatch(
                f"{key} of {self.leaves[leaf]} is {what}, which can be neither merged nor copied.",
                fix=f"leave {key} out of the state dict",
            ) from None


def spec_of(tensor: TensorInfo | View | Tensor) -> tuple[str, tuple[int, ...]]:
    """safetensors' dtype name and the shape."""
    if isinstance(tensor, TensorInfo | View):
        return tensor.dtype, tensor.shape
    return DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)


def align(root: Expression, base: Leaf | None = None) -> Inputs:
    """Match every leaf's names with those of `base`, by default the first leaf met.

    State dicts among themselves are taken by their keys as they are; beside checkpoints
    they are matched like checkpoints.

    Raises
        KeyMismatch: two names of one model mean the same tensor.
        CheckpointError: a model's weights are packed in a way that isn't read.
    """
    found = leaves(root)
    for leaf in found:
        if isinstance(leaf, Leaf):
            refuse_packed(leaf.checkpoint)
    if not any(isinstance(leaf, Leaf) for leaf in found):
        dicts = [leaf.tensors for leaf in found if isinstance(leaf, TensorLeaf)]
        own = {leaf: {key: key for key in held} for leaf, held in zip(found, dicts, strict=True)}
        return _placed(root, Inputs(found, dicts, aligned=own))
    if base is not None and base in found:
        found = [base, *(leaf for leaf in found if leaf != base)]
    reference = found[0]
    base_tensors = _tensors(reference)
    dropped = buffers(base_tensors)
    tensors: list[dict[str, Any]] = [{k: v for k, v in base_tensors.items() if k not in dropped}]
    skipped = [Skipped(str(reference), key, reason) for key, reason in dropped.items()]
    skipped += [
        Skipped(str(reference), alias, f"alias of {key}")
        for alias, key in _aliases(reference).items()
    ]
    skipped += _read_by_views(found)
    mappings = [text for leaf in found if isinstance(leaf, Leaf) for text in _renamed(leaf)]
    own_keys: list[dict[str, str]] = [{}]
    for leaf in found[1:]:
        held = _tensors(leaf)
        match = match_names(
            tensors[0],
            held,
            base_config=_config(reference),
            other_config=_config(leaf),
            base_aliases=_aliases(reference),
            other_aliases=_aliases(leaf),
        )
        spelling = match.own
        configs = _config(reference), _config(leaf)
        matched = {key: held[name] for key, name in spelling.items()}
        bridged = bridge(tensors[0], matched, configs, str(leaf))
        tensors.append(bridged.tensors)
        own_keys.append({key: name for key, name in spelling.items() if key != name})
        skipped += [Skipped(str(leaf), spelling[k], how) for k, how in bridged.used.items()]
        mappings += [f"{leaf}: {sentence}" for sentence in match.mappings]
        skipped += [Skipped(str(leaf), key, reason) for key, reason in match.skipped.items()]
    mappings += _fill_tied_heads(found, tensors, own_keys)
    aligned = {
        leaf: {key: renamed.get(key, key) for key in held}
        for leaf, held, renamed in zip(found, tensors, own_keys, strict=True)
    }
    return _placed(root, Inputs(found, tensors, mappings, skipped, own_keys, aligned=aligned))


def _fill_tied_heads(
    found: Sequence[Leaf | TensorLeaf],
    tensors: Sequence[dict[str, Any]],
    own_keys: Sequence[dict[str, str]],
) -> list[str]:
    """Give models that tie their heads, the base among them, what others have as a tensor of its
    own; sentences on it."""
    heads = {key: tuple(held[key].shape) for held in tensors for key in held if OUTPUT.search(key)}
    words = vocabulary(*map(_config, found))
    said = []
    for leaf, held, own in zip(found, tensors, own_keys, strict=True):
        lacking = [key for key in heads if key not in held] if ties(_config(leaf)) else []
        for key in lacking:
            sources = tied_to(key, heads[key], open_side(held, {}), held.keys(), words)
            if len(sources) == 1:
                (source,) = sources
                held[key], own[key] = held[source], own.get(source, source)
                said.append(f"{leaf}: {key} is read from {own[key]} (tied)")
    return said


def placements(root: Expression) -> list[tuple[Leaf | TensorLeaf, Path]]:
    """Every leaf and every way in which it is seen, in the order in which they are first met."""
    found: dict[tuple[Leaf | TensorLeaf, Path], None] = {}
    seen: set[tuple[int, Path]] = set()
    stack: list[tuple[Expression, Path]] = [(root, ())]
    while stack:
        node, path = stack.pop()
        if (id(node), path) in seen:
            continue
        seen.add((id(node), path))
        if isinstance(node, Leaf | TensorLeaf):
            found.setdefault((node, path))
        below = (*path, node.move) if isinstance(node, Renumber) else path
        stack.extend(reversed([(child, below) for child in children(node)]))
    return list(found)


def _placed(root: Expression, inputs: Inputs) -> Inputs:
    """The inputs with a leaf for each way in which one is seen."""
    placed = placements(root)
    if not any(path for _, path in placed):
        return inputs
    index = {leaf: i for i, leaf in enumerate(inputs.leaves)}
    placed.sort(key=lambda at: index[at[0]])
    tensors, own_keys = [], []
    for leaf, path in placed:
        held, own = inputs.tensors[index[leaf]], inputs.aligned[leaf]
        outside = {key: outer_key(path, key) for key in held}
        tensors.append({outer: held[key] for key, outer in outside.items() if outer is not None})
        own_keys.append(
            {
                outer: own[key]
                for key, outer in outside.items()
                if outer is not None and outer != own[key]
            }
        )
    return replace(
        inputs,
        leaves=[leaf for leaf, _ in placed],
        tensors=tensors,
        own_keys=own_keys,
        paths=[path for _, path in placed],
    )


def _tensors(leaf: Leaf | TensorLeaf) -> Mapping[str, Any]:
    return leaf.checkpoint.presented if isinstance(leaf, Leaf) else leaf.tensors


def _read_by_views(found: Sequence[Leaf | TensorLeaf]) -> list[Skipped]:
    """Tensors that no key of the output stands for: views read them for others."""
    return [
        Skipped(str(leaf), key, what)
        for leaf in found
        if isinstance(leaf, Leaf)
        for key, what in leaf.checkpoint.used.items()
    ]


def _renamed(leaf: Leaf) -> list[str]:
    """A sentence on the keys that the user's rules renamed."""
    renamed = leaf.checkpoint.renamed
    if not renamed:
        return []
    name, own = next(iter(renamed.items()))
    count = "1 key" if len(renamed) == 1 else f"{len(renamed)} keys"
    return [f"{leaf}: {count} renamed, such as {own} -> {name}"]


def _config(leaf: Leaf | TensorLeaf) -> Mapping[str, Any] | None:
    return leaf.checkpoint.config if isinstance(leaf, Leaf) else None


def _aliases(leaf: Leaf | TensorLeaf) -> Mapping[str, str]:
    return leaf.checkpoint.aliases if isinstance(leaf, Leaf) else {}
