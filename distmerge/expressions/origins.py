"""From a layer of the output back to the model whose layer it is, whatever moved it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from distmerge.expressions.nodes import (
    Apply,
    Binary,
    Branch,
    Expression,
    Leaf,
    Renumber,
    Select,
    Stack,
    walk,
)
from distmerge.methods.parameters import Layers, layer_of


def layer_origins(
    root: Expression, keys: Iterable[str]
) -> Mapping[str, list[tuple[Leaf | None, int]]]:
    """For each family of layers in the output, where each layer came from: the base, or the first
    of the models that were merged, and its number there. Empty where nothing moves layers.
    """
    if not any(isinstance(node, Renumber) for node in walk(root)):
        return {}
    counts = Layers.of(keys).counts
    return {
        family: [_origin(root, f"{family}.{n}.".removeprefix("."), n) for n in range(count)]
        for family, count in counts.items()
    }


def _origin(node: Expression, key: str, number: int) -> tuple[Leaf | None, int]:
    if isinstance(node, Stack | Branch):
        part = node.part_of(key)
        return (None, number) if part is None else _origin(node.parts[part], key, number)
    if isinstance(node, Renumber):
        inner = node.move.inner(key)
        found = layer_of(inner) if inner is not None else None
        return _origin(node.child, inner or key, found[1] if found else number)
    if isinstance(node, Binary):
        side = node.right if isinstance(node.left, int | float) else node.left
        return (None, number) if isinstance(side, int | float) else _origin(side, key, number)
    if isinstance(node, Apply):
        first = node.models[node.base_index or 0] if node.base_listed else node.models[0]
        return _origin(node.base if node.base is not None else first, key, number)
    if isinstance(node, Select):
        return _origin(node.child, key, number)
    return (node if isinstance(node, Leaf) else None), number
