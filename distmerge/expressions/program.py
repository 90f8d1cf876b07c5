"""An expression specialised for one output key: a short list of steps with plain numbers."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distmerge.methods.blocks import Granularity
from distmerge.methods.method import MergeMethod
from distmerge.methods.sharing import is_plain


@dataclass(frozen=True, slots=True)
class Read:
    """One leaf's tensor."""

    leaf: int


@dataclass(frozen=True, slots=True)
class Compute:
    """An operator on two steps, or a step and a number."""

    operator: str
    left: int | None
    right: int | None
    number: float = 0.0

    def value(self, values: Sequence[Any]) -> Any:
        """The result, from those of the steps before it."""
        left = self.number if self.left is None else values[self.left]
        right = self.number if self.right is None else values[self.right]
        if self.operator == "+":
            return left + right
        if self.operator == "-":
            return left - right
        return left * right if self.operator == "*" else left / right


@dataclass(frozen=True, slots=True)
class Call:
    """A merge method on steps."""

    node: int
    """Ordinal of the node in its expression: part of the place of its random numbers."""
    method: MergeMethod
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    base: int | None
    base_index: int | None
    parameters: Mapping[str, Any]
    key: str | None = None
    """What the node itself calls the key, if that isn't the output's name for it: what random
    numbers are drawn for, and what the method is told."""

    def sees(self, shape: tuple[int, ...]) -> Granularity:
        """What the method must see at once of a tensor of this shape."""
        return self.method.sees(self.parameters, shape)


@dataclass(frozen=True, slots=True)
class Same:
    """Tensors that must be equal and are copied as they are: integers, booleans."""

    leaves: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scales:
    """What another tensor of the output, written in 8 bits, has to be multiplied by."""

    of: str
    """Its key."""


Step = Read | Compute | Call | Same | Scales


@dataclass(frozen=True, slots=True)
class Program:
    """Steps for one key; each refers to earlier ones by index, the last is the result."""

    key: str
    steps: tuple[Step, ...]
    leaves: tuple[int, ...] = field(default=(), compare=False, repr=False)
    """Leaves that are read, in order; found in the steps unless they are known."""

    def __post_init__(self) -> None:
        if not self.leaves:
            object.__setattr__(self, "leaves", leaves_of(self.steps))

    @property
    def seamless(self) -> bool:
        """Does it give the same bits however wide the blocks are that it is given?"""
        return all(
            s.method.is_seamless(s.parameters) if isinstance(s, Call) else not isinstance(s, Scales)
            for s in self.steps
        )

    def raw_reads(self, gathered: Collection[int]) -> frozenset[int]:
        """Steps that read what only methods see which take it as it was read.

        gathered: steps that call a method whose operands are put together first.
        """
        widened = {len(self.steps) - 1}
        for place, step in enumerate(self.steps):
            if isinstance(step, Compute):
                widened |= {i for i in (step.left, step.right) if i is not None}
            elif isinstance(step, Call) and (place in gathered or not step.method.raw):
                widened |= set(operands(step))
        return frozenset(i for i, s in enumerate(self.steps) if isinstance(s, Read)) - widened


def leaves_of(steps: Sequence[Step]) -> tuple[int, ...]:
    """The leaves that steps read, in order."""
    read = [s.leaf for s in steps if isinstance(s, Read)]
    same = [leaf for s in steps if isinstance(s, Same) for leaf in s.leaves]
    return tuple(dict.fromkeys(read + same))


def needed(steps: Sequence[Step], root: int) -> list[Step]:
    """The steps that `root` depends on, itself last: policy may have left some out."""
    used = {root}
    for place in range(root, -1, -1):
        if place in used:
            used.update(operands(steps[place]))
    if len(used) == len(steps):
        return list(steps)
    new = {place: i for i, place in enumerate(sorted(used))}
    return [moved(steps[place], new) for place in sorted(used)]


def operands(step: Step) -> list[int]:
    """Places of the steps that a step works on, the base first."""
    if isinstance(step, Compute):
        return [side for side in (step.left, step.right) if side is not None]
    if isinstance(step, Call):
        places = [place for _, members in step.inputs for place in members]
        return places if step.base is None else [step.base, *places]
    return []


def moved(step: Step, new: Mapping[int, int]) -> Step:
    """The step, its operands at their new places."""
    if isinstance(step, Compute):
        left, right = (None if s is None else new[s] for s in (step.left, step.right))
        return replace(step, left=left, right=right)
    if isinstance(step, Call):
        inputs = tuple((name, tuple(new[p] for p in members)) for name, members in step.inputs)
        return replace(step, inputs=inputs, base=None if step.base is None else new[step.base])
    return step


def sharing_key(step: Compute | Call, seed: int, key: str) -> Hashable:
    """What two steps have in common that make the same of the same operands.

    seed, key: of the run, and of the step's program."""
    if isinstance(step, Compute):
        number = repr(step.number)  # 0.0 equals -0.0
        return "compute", step.operator, step.left is None, step.right is None, number
    if not is_plain(list(step.parameters.values())):
        return object()  # that of nothing else
    roles = tuple((name, len(places)) for name, places in step.inputs)
    drawn = seed, step.node, step.key or key
    given = repr(sorted(step.parameters.items()))
    return "call", step.method, roles, step.base is None, step.base_index, given, drawn
