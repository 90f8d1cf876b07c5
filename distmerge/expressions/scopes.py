"""Where in an expression a key is looked for: what it is called there, and among which layers.

A key changes its name below a `Renumber`; gradients run over the layers of the slice, or of the
nested merge, that they are written in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from distmerge.errors import RecipeError
from distmerge.expressions.alignment import Inputs
from distmerge.expressions.layers import Path
from distmerge.expressions.nodes import (
    Expression,
    Leaf,
    Renumber,
    Stack,
    TensorLeaf,
    children,
    walk,
)
from distmerge.methods.parameters import Layers


@dataclass(frozen=True, slots=True)
class Scope:
    """One output key, as it is seen at some place of an expression."""

    output: str
    key: str
    """What the output's key is called here."""
    path: Path
    layers: Layers


class Scopes:
    """The scopes of one output key after another."""

    def __init__(self, inputs: Inputs, *, layered: bool = True) -> None:
        """layered: does anything run over layers? If not, scopes say nothing of them, and a
        hundred thousand keys needn't be searched for their numbers."""
        self._layered = layered
        self._aligned = inputs.aligned
        self._counts: dict[int, Mapping[str, int]] = {}
        self._layers: dict[tuple[int, int | None], Layers] = {}
        self._scopes: dict[tuple[int, int], Scope | None] = {}

    def root(self, node: Expression, key: str) -> Scope:
        """The outermost scope of a key. Scopes of an earlier key are forgotten."""
        self._scopes.clear()
        return Scope(key, key, (), self._layers_of(node))

    def inside(self, node: Renumber, scope: Scope) -> Scope | None:
        """The scope below a move; None if it leaves the key out."""
        place = id(node), id(scope)
        if place not in self._scopes:
            key = node.move.inner(scope.key)
            path, layers = (*scope.path, node.move), self._layers_of(node.child)
            self._scopes[place] = None if key is None else Scope(scope.output, key, path, layers)
        return self._scopes[place]

    def own_keys(self, models: Sequence[Expression], scope: Scope) -> list[str]:
        """What each model calls the scope's key."""
        inside = [self.inside(m, scope) if isinstance(m, Renumber) else scope for m in models]
        return [scope.key if one is None else one.key for one in inside]

    def part(self, node: Stack, part: int, scope: Scope) -> Scope:
        """The scope of a part: gradients run over its own layers."""
        place = id(node), id(scope)
        if place not in self._scopes:
            at = id(node), part
            if at not in self._layers:
                span = node.spans[part]
                counts = {**scope.layers.counts, node.family: span.stop}
                self._layers[at] = Layers(counts, {node.family: span.start})
            self._scopes[place] = replace(scope, layers=self._layers[at])
        found = self._scopes[place]
        assert found is not None
        return found

    def _layers_of(self, node: Expression) -> Layers:
        if (id(node), None) not in self._layers:
            counts = self.counts(node) if self._layered else {}
            self._layers[id(node), None] = Layers(counts)
        return self._layers[id(node), None]

    def counts(self, node: Expression) -> Mapping[str, int]:
        """How many layers each family of an expression has."""
        if id(node) not in self._counts:
            self._counts[id(node)] = self._new_counts(node)
        return self._counts[id(node)]

    def _new_counts(self, node: Expression) -> Mapping[str, int]:
        if isinstance(node, Leaf | TensorLeaf):
            return Layers.of(self._aligned[node]).counts
        found: dict[str, int] = {}
        for child in children(node):
            for family, count in self.counts(child).items():
                found[family] = max(found.get(family, 0), count)
        if isinstance(node, Renumber):
            move = node.move
            found[move.family] = move.first + move.stop - move.start
        elif isinstance(node, Stack):
            found[node.family] = sum(node.counts)
        return found


def check_moves(root: Expression, scopes: Scopes) -> None:
    """Refuse ranges of layers that a model doesn't have. Raises RecipeError."""
    for node in walk(root):
        if isinstance(node, Renumber):
            move = node.move
            count = scopes.counts(node.child).get(move.family, 0)
            if not 0 <= move.start < move.stop <= count:
                raise RecipeError(
                    f"{node.child} has no layers {move.start} to {move.stop}.",
                    f"it has {count} as {move.family}.N, counted from 0, the end not included",
                    fix=f"layer_range: [0, {count}]",
                )
