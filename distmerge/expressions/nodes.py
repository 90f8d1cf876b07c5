"""The expression tree: what a merge computes, without any data.

Leaves are checkpoints, or state dicts in memory; inner nodes apply a merge method, or one of the
four operators, to their children, or present them under other keys. A tree is immutable, hashable
and picklable, and prints as its own formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, cast

from torch import Tensor

from distmerge.checkpoints.tensors import Checkpoint
from distmerge.errors import RecipeError
from distmerge.expressions.layers import Move, comes_before
from distmerge.methods.method import MergeMethod
from distmerge.methods.parameters import layer_of

Operator = Literal["+", "-", "*", "/"]
OnUnequal = Literal["error", "base"]
"""What becomes of an integer or boolean tensor that isn't equal in every model: refuse, or copy
the base's."""
OnShapeMismatch = Literal["error", "base", "skip"]
"""What becomes of a tensor whose shapes differ between the models that it is merged from: refuse,
copy the base's (the first model's where the base isn't among them), or leave it out."""
OnMissing = Literal["error", "common", "base", "average"]
"""What becomes of a key that not every child of a node has: refuse; leave it out; take the
base's (leave it out where the base lacks it); average those that have it."""
LARGEST_EXPRESSION = 50_000
"""Nodes of an expression, written out in full."""


class Node:
    """What all nodes have in common."""

    @cached_property
    def size(self) -> int:
        """How many nodes the formula has in full: a shared one counts once for each use."""
        return 1 + sum(child.size for child in children(cast("Expression", self)))


@dataclass(frozen=True)
class Leaf(Node):
    """A checkpoint. Two leaves are equal if they pin the same bytes under the same name."""

    checkpoint: Checkpoint = field(compare=False)
    name: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str | None = None) -> Leaf:
        return cls(checkpoint, name or name_of(checkpoint))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Leaf) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    @cached_property
    def identity(self) -> tuple[str, str]:
        return self.checkpoint.url, self.checkpoint.fingerprint

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class TensorLeaf(Node):
    """A state dict in memory; equal only to itself. It can't travel to other machines."""

    tensors: Mapping[str, Tensor] = field(compare=False, repr=False)
    name: str = "tensors"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorLeaf) and self.tensors is other.tensors

    def __hash__(self) -> int:
        return id(self.tensors)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Binary(Node):
    """`left operator right`; one side at most is a number or a zero-dimensional tensor's value."""

    operator: Operator
    left: Expression | float
    right: Expression | float
    on_missing: OnMissing = "error"

    def __str__(self) -> str:
        return f"({_number(self.left)} {self.operator} {_number(self.right)})"


@dataclass(frozen=True)
class Apply(Node):
    """A merge method applied to children."""

    method: MergeMethod
    inputs: tuple[tuple[str, tuple[Expression, ...]], ...]
    """For each argument that takes one tensor from every model, its children."""
    base: Expression | None = None
    """Only for a method that takes its base apart; else the base is one of the models."""
    base_index: int | None = 0
    """Where the base stands, or stood, among the models as the caller listed them; None if the
    caller said that there is none."""
    parameters: tuple[tuple[str, Any], ...] = ()
    """Values, gradients or filters by name; tuples, one for each model, for per-model ones."""
    on_missing: OnMissing = "error"
    passthrough: frozenset[str] = frozenset()
    """Keys, or prefixes of keys, that are not merged but averaged over the models without
    the base."""
    base_listed: bool = False
    """Is the model at `base_index` the base, for a method that doesn't take it apart?"""

    @property
    def models(self) -> tuple[Expression, ...]:
        return self.inputs[0][1]

    def __hash__(self) -> int:
        # Values of parameters may be of any kind, without a hash: dicts, say.
        return hash((self.method.name, self.inputs, self.base))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Apply) or self._key() != other._key():
            return False
        try:
            return self.parameters == other.parameters
        except (RuntimeError, ValueError):  # tensors and arrays are not simply equal or unequal
            return False

    def _key(self) -> tuple[Any, ...]:
        method = (self.method.name, self.method.source_hash)
        options = (self.base_index, self.on_missing, self.passthrough, self.base_listed)
        return method, self.inputs, self.base, options

    def __str__(self) -> str:
        parts = [", ".join(map(str, self.models))]
        parts += [f"{name}=[{', '.join(map(str, xs))}]" for name, xs in self.inputs[1:]]
        parts += [f"base={self.base}"] if self.base is not None else []
        parts += [f"{name}={_value(value)}" for name, value in self.parameters]
        return f"{self.method.name}({', '.join(parts)})"


@dataclass(frozen=True)
class Select(Node):
    """Some keys of an expression, the others left out."""

    child: Expression
    keys: frozenset[str]
    """As the output spells them."""

    def __str__(self) -> str:
        return f"{self.child}[{len(self.keys)} keys]"


@dataclass(frozen=True)
class Renumber(Node):
    """Some layers of an expression under other numbers; what is in no layer keeps its key."""

    child: Expression
    move: Move

    def __str__(self) -> str:
        return f"{self.child}[{self.move.start}:{self.move.stop}]"


@dataclass(frozen=True)
class Stack(Node):
    """Layers of several expressions, one above the other.

    Each part gives the layers that are its own, numbered as the output numbers them. What comes
    before the layers is the first part's, what comes after them the last's.
    """

    parts: tuple[Expression, ...]
    family: str
    """Whose numbers count, as in `Layers`."""
    counts: tuple[int, ...]
    """How many layers each part gives."""

    def part_of(self, key: str) -> int | None:
        """Which part gives a key; None for a layer that no part gives."""
        found = layer_of(key)
        if found is None or found[0] != self.family:
            return 0 if comes_before(key, self.family) else len(self.parts) - 1
        return next((i for i, span in enumerate(self.spans) if found[1] in span), None)

    @property
    def spans(self) -> list[range]:
        """The layers that each part gives."""
        ends = list(accumulate(self.counts))
        return [range(end - count, end) for end, count in zip(ends, self.counts, strict=True)]

    def __str__(self) -> str:
        return f"stack({', '.join(map(str, self.parts))})"


@dataclass(frozen=True)
class Branch(Node):
    """Each module of the model from an expression of its own."""

    parts: tuple[Expression, ...]
    prefixes: tuple[tuple[str, ...], ...]
    """For each part, how its keys begin; the longest that fits counts, and "" fits every key."""

    def part_of(self, key: str) -> int | None:
        """Which part gives a key; None if none does."""
        fits = [(len(p), -i) for i, ps in enumerate(self.prefixes) for p in ps if key.startswith(p)]
        return -max(fits)[1] if fits else None

    def __str__(self) -> str:
        pairs = zip(self.prefixes, self.parts, strict=True)
        return f"modules({', '.join(f'{ps[0]}*={part}' for ps, part in pairs)})"


Expression = Leaf | TensorLeaf | Binary | Apply | Select | Renumber | Stack | Branch


def children(node: Expression) -> Iterator[Expression]:
    """The expressions below a node, in order, the base first."""
    if isinstance(node, Binary):
        yield from (side for side in (node.left, node.right) if not isinstance(side, int | float))
    elif isinstance(node, Apply):
        if node.base is not None:
            yield node.base
        for _, members in node.inputs:
            yield from members
    elif isinstance(node, Select | Renumber):
        yield node.child
    elif isinstance(node, Stack | Branch):
        yield from node.parts


def check_size(size: int, what: str) -> None:
    """Refuse an expression that uses its own parts so often that nobody could write it out:
    formulas and digests do.

    Raises
        RecipeError
    """
    if size > LARGEST_EXPRESSION:
        raise RecipeError(
            f"{what} uses its own parts too often.",
            f"written out in full it has more than {LARGEST_EXPRESSION:,} nodes",
            "m + t * (x - m) uses m twice, and each step doubles it: m * (1 - t) + t * x doesn't",
            fix="merge a part that is used often first, and name the result as a model",
        )


def leaves(root: Expression) -> list[Leaf | TensorLeaf]:
    """Every distinct leaf, in the order in which they are first met."""
    found: dict[Leaf | TensorLeaf, None] = {}
    for node in walk(root):
        if isinstance(node, Leaf | TensorLeaf):
            found.setdefault(node)
    return list(found)


def walk(root: Expression) -> Iterator[Expression]:
    """Every node once, parents before children, however often it is shared."""
    stack = [root]
    seen: set[int] = set()
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        stack.extend(reversed(list(children(node))))


def name_of(checkpoint: Checkpoint) -> str:
    """A checkpoint's name in formulas, its adapter's with it."""
    urls = [checkpoint.own_url, *(other.url for other in checkpoint.others)]
    return "+".join(map(short_name, urls))


def short_name(url: str) -> str:
    """A checkpoint's name in formulas: the last part of its path."""
    return url.rstrip("/").rsplit("/", 1)[-1] or url


def _number(side: Expression | float) -> str:
    return f"{side:g}" if isinstance(side, int | float) else str(side)


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return f"{value:g}" if type(value) is float else str(value)
