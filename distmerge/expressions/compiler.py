"""From an expression over aligned inputs to programs, key by key.

Everything that can differ by key is settled here, from headers alone: which leaves have the key,
which layer's parameters hold, whether shapes and dtypes agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distmerge.checkpoints.tensors import FLOAT_DTYPES
from distmerge.errors import RecipeError
from distmerge.expressions.alignment import Inputs
from distmerge.expressions.layers import Path
from distmerge.expressions.node_parameters import NodeParameters, varies
from distmerge.expressions.nodes import (
    Apply,
    Binary,
    Branch,
    Expression,
    Leaf,
    OnShapeMismatch,
    OnUnequal,
    Renumber,
    Select,
    Stack,
    TensorLeaf,
    walk,
)
from distmerge.expressions.problems import Problems
from distmerge.expressions.program import (
    Call,
    Compute,
    Program,
    Read,
    Same,
    Step,
    leaves_of,
    needed,
)
from distmerge.expressions.scopes import Scope, Scopes, check_moves

_Done = dict[tuple[int, int], int | None]
"""By the identities of a node and of the scope it is built in, its step."""
_Steps = tuple[tuple[Step, ...], tuple[int, ...]]
"""Steps, and the leaves that they read."""
_Kind = tuple[bool | int, ...]
"""All that the steps of a key depend on, where no node treats keys by name."""


class Compiler:
    """Turns one expression over aligned inputs into programs, key by key."""

    def __init__(
        self,
        root: Expression,
        inputs: Inputs,
        *,
        on_unequal: OnUnequal = "error",
        on_shape_mismatch: OnShapeMismatch = "error",
    ) -> None:
        self.root = root
        self.on_unequal = on_unequal
        self.on_shape_mismatch = on_shape_mismatch
        self.inputs = inputs
        self.problems = Problems()
        self.parameters = NodeParameters()
        self._by_name = any(map(_by_name, walk(root)))
        self.scopes = Scopes(inputs, layered=self._by_name)
        paths: Sequence[Path] = inputs.paths or [()] * len(inputs.leaves)
        places = zip(inputs.leaves, paths, strict=True)
        self._leaf_index = {place: i for i, place in enumerate(places)}
        self._ordinals = _ordinals(root)
        self._merging = True
        self._heads = [n.passthrough for n in walk(root) if isinstance(n, Apply) and n.passthrough]
        self._alike: dict[_Kind, _Steps] = {}
        check_moves(root, self.scopes)

    def program(self, key: str) -> Program | None:
        """The key's program; None if policy leaves the key out. Notes problems, raises none."""
        have = [i for i, tensors in enumerate(self.inputs.tensors) if key in tensors]
        if not have:
            return None
        specs = {i: self.inputs.spec(i, key) for i in have}
        merging = all(dtype in FLOAT_DTYPES for dtype, _ in specs.values())
        steps, leaves = self._steps(key, have, merging=merging)
        if not steps:
            return None
        read = {i: specs[i] for i in sorted(leaves)}
        if self.on_shape_mismatch == "error":
            self._check_shapes(key, read)
        elif len({shape for _, shape in read.values()}) > 1:
            return self._unfitting(key, min(read))
        dtypes = {dtype for dtype, _ in read.values()}
        if dtypes <= FLOAT_DTYPES:
            if not merging:
                steps, leaves = self._steps(key, have, merging=True)
            return Program(key, steps, leaves)
        if len(dtypes) > 1:
            self.problems.dtypes[key] = [
                f"{dtype} in {self.inputs.leaves[i]}" for i, (dtype, _) in read.items()
            ]
        return Program(key, (Same(tuple(read) if self.on_unequal == "error" else (min(read),)),))

    def _unfitting(self, key: str, first: int) -> Program | None:
        """What becomes of a key whose shapes differ; `first` is the base where it has the key."""
        if self.on_shape_mismatch == "skip":
            return None
        floats = self.inputs.spec(first, key)[0] in FLOAT_DTYPES
        return Program(key, (Read(first) if floats else Same((first,)),))

    def _steps(self, key: str, have: Sequence[int], *, merging: bool) -> _Steps:
        """The steps that the key needs, and what they read; copying ones have no parameters. Keys
        of one kind share them: a mixture of experts has a hundred thousand.

        have: the leaves that have the key.
        """
        kind = (merging, *(passes(key, heads) for heads in self._heads), *have)
        if kind in self._alike:
            return self._alike[kind]
        self._merging = merging
        built: list[Step] = []
        noted = len(self.problems.missing)
        root = self._build(self.root, self.scopes.root(self.root, key), built, {})
        steps = () if root is None else tuple(needed(built, root))
        found = steps, leaves_of(steps)
        if not self._by_name and noted == len(self.problems.missing):
            self._alike[kind] = found
        return found

    def _check_shapes(self, key: str, specs: Mapping[int, tuple[str, tuple[int, ...]]]) -> None:
        if len({shape for _, shape in specs.values()}) > 1:
            self.problems.shapes[key] = [
                f"{' x '.join(map(str, shape)) or 'scalar'} in {self.inputs.leaves[i]}"
                for i, (_, shape) in specs.items()
            ]

    def _build(
        self, node: Expression, scope: Scope | None, steps: list[Step], done: _Done
    ) -> int | None:
        if scope is None:
            return None
        place = id(node), id(scope)
        if place not in done:
            done[place] = self._build_new(node, scope, steps, done)
        return done[place]

    def _build_new(
        self, node: Expression, scope: Scope, steps: list[Step], done: _Done
    ) -> int | None:
        if isinstance(node, Leaf | TensorLeaf):
            leaf = self._leaf_index[node, scope.path]
            return _add(steps, Read(leaf)) if scope.output in self.inputs.tensors[leaf] else None
        if isinstance(node, Binary):
            return self._build_binary(node, scope, steps, done)
        if isinstance(node, Select):
            return self._build(node.child, scope, steps, done) if scope.key in node.keys else None
        if isinstance(node, Renumber):
            return self._build(node.child, self.scopes.inside(node, scope), steps, done)
        if isinstance(node, Stack | Branch):
            part = node.part_of(scope.key)
            if part is None:
                return None
            inside = self.scopes.part(node, part, scope) if isinstance(node, Stack) else scope
            return self._build(node.parts[part], inside, steps, done)
        return self._build_apply(node, scope, steps, done)

    def _build_binary(
        self, node: Binary, scope: Scope, steps: list[Step], done: _Done
    ) -> int | None:
        numbers = [side for side in (node.left, node.right) if isinstance(side, int | float)]
        built = [
            self._build(side, scope, steps, done)
            for side in (node.left, node.right)
            if not isinstance(side, int | float)
        ]
        if numbers:
            if built[0] is None:
                return None
            left = built[0] if not isinstance(node.left, int | float) else None
            right = built[0] if left is None else None
            return _add(steps, Compute(node.operator, left, right, float(numbers[0])))
        if None in built:
            if node.on_missing == "error" and built != [None, None]:
                lacking = node.left if built[0] is None else node.right
                self.problems.missing.setdefault(scope.output, f"not in {lacking}")
            return None
        return _add(steps, Compute(node.operator, built[0], built[1]))

    def _build_apply(self, node: Apply, scope: Scope, steps: list[Step], done: _Done) -> int | None:
        base = None if node.base is None else self._build(node.base, scope, steps, done)
        built = [
            (name, [self._build(m, scope, steps, done) for m in members])
            for name, members in node.inputs
        ]
        present = [step for step in built[0][1] if step is not None]
        if passes(scope.key, node.passthrough):
            # The base was not trained on what the heads are for: it counts only if alone.
            apart = node.base_index if node.base_listed else None
            trained = [s for i, s in enumerate(built[0][1]) if s is not None and i != apart]
            alone = present if base is None else [base]
            return self._average(steps, trained or alone)
        everywhere = all(step is not None for _, members in built for step in members)
        if everywhere and (node.base is None or base is not None):
            inputs = tuple((n, tuple(s for s in members if s is not None)) for n, members in built)
            given: Mapping[str, Any] = {}
            if self._merging:
                own = self.scopes.own_keys(node.models, scope)
                given = self.parameters.of(node, scope.key, scope.layers, own)
            own_key = None if scope.key == scope.output else scope.key
            ordinal = self._ordinals[id(node)]
            call = Call(ordinal, node.method, inputs, base, node.base_index, given, own_key)
            return _add(steps, call)
        return self._missing(node, scope.output, steps, base, present, built)

    def _missing(
        self,
        node: Apply,
        key: str,
        steps: list[Step],
        base: int | None,
        present: list[int],
        built: list[tuple[str, list[int | None]]],
    ) -> int | None:
        if base is None and not present:
            return None
        if node.on_missing == "base":
            return base if node.base is not None else built[0][1][node.base_index or 0]
        if node.on_missing == "average":
            return self._average(steps, present or [base])  # type: ignore[list-item]
        if node.on_missing == "error":
            lacking = [
                str(child)
                for (_, members), (_, found) in zip(node.inputs, built, strict=True)
                for child, step in zip(members, found, strict=True)
                if step is None
            ]
            lacking += [str(node.base)] if node.base is not None and base is None else []
            self.problems.missing.setdefault(key, "not in " + ", ".join(lacking))
        return None

    def _average(self, steps: list[Step], have: list[int]) -> int | None:
        if not have:
            return None
        result = have[0]
        for step in have[1:]:
            result = _add(steps, Compute("+", result, step))
        if len(have) > 1:
            result = _add(steps, Compute("/", result, None, float(len(have))))
        return result


def _ordinals(root: Expression) -> dict[int, int]:
    """By a node's identity, its ordinal among the distinct nodes that apply a method: equal nodes
    draw equal numbers, so that equal expressions have equal values."""
    distinct: dict[Apply, int] = {}
    found: dict[int, int] = {}
    for node in walk(root):
        if isinstance(node, Apply):
            check_models(node)
            found[id(node)] = distinct.setdefault(node, len(distinct))
    return found


def _by_name(node: Expression) -> bool:
    """Can what a node makes of a key depend on the key's name, heads apart?"""
    if isinstance(node, Apply):
        return any(varies(value) for _, value in node.parameters)
    return not isinstance(node, Leaf | TensorLeaf | Binary)


def check_models(node: Apply) -> None:
    """Refuse a node with too few or too many models, without a base that its method needs, or
    with parameters the method doesn't have.

    Raises
        RecipeError, ParameterError
    """
    method = node.method
    if node.base is None and method.base_required:
        raise RecipeError(
            f"{method.name} needs a base model.", fix="base_model: ..., or base_index=0 in a call"
        )
    method.check_count(node.models, node.base)
    method.check_parameters(dict(node.parameters))


def _add(steps: list[Step], step: Step) -> int:
    steps.append(step)
    return len(steps) - 1


def passes(key: str, passthrough: frozenset[str]) -> bool:
    """Is the key one of these, or below one of them?"""
    return bool(passthrough) and any(key == p or key.startswith(p + ".") for p in passthrough)
