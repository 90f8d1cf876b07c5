"""What each tensor of an output is made of, read off a plan: every step with its plain numbers.

`distmerge explain` shows it. The plan has been made from headers, so nothing is read for it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from distmerge.checkpoints.low_rank import LowRank, Shifted
from distmerge.checkpoints.row_map import Unfilled
from distmerge.checkpoints.scales import Scaled
from distmerge.checkpoints.tensors import Checkpoint
from distmerge.checkpoints.views import Joined, Plain, Slice, View, parts_of
from distmerge.errors import KeyMismatch
from distmerge.expressions.alignment import Inputs, Skipped
from distmerge.expressions.nodes import Leaf, short_name
from distmerge.expressions.program import Call, Compute, Read, Same, Scales
from distmerge.methods.padding import with_mean_rows
from distmerge.plan.work import KeyTask

if TYPE_CHECKING:
    from distmerge.plan.plan import Plan

Values = tuple[tuple[str, Any], ...]
"""Parameters by name."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a model lies."""

    key: str
    """As the model spells it."""
    files: tuple[str, ...]
    """Empty for a state dict in memory."""
    made: str
    """How it is made of what the files hold; empty where it is taken as it is."""


@dataclass(frozen=True)
class Piece:
    """One place of a tensor's tree."""

    kind: str
    """`method`, `operator`, `number`, `model`, `copied` or `scales`; `nested` is what a method
    gives to something that is no model, which stands below."""
    what: str
    """The method's, the operator's or the model's name, or the number."""
    role: str = ""
    """What it is to the method above: `base`, or the argument it is given as."""
    values: Values = ()
    """Parameters: a method's that hold for all models; beside each model its own."""
    place: Place | None = None
    below: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Explained:
    """One tensor of the output."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    tree: Piece
    lacking: tuple[str, ...]
    """Models without a tensor of this name, which don't count for it."""


def explain(plan: Plan, pattern: str | None = None) -> tuple[list[Explained], list[Skipped]]:
    """Every tensor that is written, and every one that is left out, whose name is `pattern` or
    fits it as a glob. Raises KeyMismatch if there is none.
    """
    wanted = [
        _explained(task, unit.shard, plan.inputs)
        for unit in plan.units
        for task in unit.tasks
        if _fits(task.program.key, pattern)
    ]
    skipped = [entry for entry in plan.skipped if _fits(entry.key, pattern)]
    if pattern is not None and not wanted and not skipped:
        near = difflib.get_close_matches(pattern, list(plan.weight_map), 1, cutoff=0.3)
        raise KeyMismatch(
            f"No tensor is called {pattern!r}.",
            f"{len(plan.weight_map)} are written, {len(plan.skipped)} left out",
            fix=f"{near[0]!r} is one; '*mlp*' takes every name with mlp in it"
            if near
            else "leave KEY out to see all",
        )
    return wanted, skipped


def to_json(plan: Plan, pattern: str | None = None) -> dict[str, Any]:
    """All of it as plain data."""
    wanted, skipped = explain(plan, pattern)
    return {
        "expression": plan.expression,
        "tensors": {
            one.key: {
                "dtype": one.dtype,
                "shape": list(one.shape),
                "shard": one.shard,
                "not_in": list(one.lacking),
                "from": _plain(one.tree),
            }
            for one in wanted
        },
        "skipped": [{"model": s.model, "key": s.key, "reason": s.reason} for s in skipped],
        "warnings": list(plan.request.warnings),
    }


def _fits(key: str, pattern: str | None) -> bool:
    return pattern is None or key == pattern or fnmatchcase(key, pattern)


def _explained(task: KeyTask, shard: str, inputs: Inputs) -> Explained:
    tree = _piece(task, len(task.program.steps) - 1, inputs)
    lacking: tuple[str, ...] = ()
    if not any(inputs.paths) and not isinstance(task.program.steps[0], Scales):
        held = zip(inputs.leaves, inputs.tensors, strict=True)
        lacking = tuple(str(leaf) for leaf, tensors in held if task.program.key not in tensors)
    return Explained(task.program.key, task.dtype, task.shape, shard, tree, lacking)


def _piece(task: KeyTask, at: int, inputs: Inputs) -> Piece:
    step = task.program.steps[at]
    if isinstance(step, Read):
        return _model(task, step.leaf, inputs)
    if isinstance(step, Same):
        models = tuple(_model(task, leaf, inputs) for leaf in step.leaves)
        return Piece("copied", "copied" if len(models) == 1 else "copied if equal", below=models)
    if isinstance(step, Scales):
        return Piece("scales", f"scales of {step.of}")
    if isinstance(step, Compute):
        number = Piece("number", repr(step.number))
        sides = (
            number if side is None else _piece(task, side, inputs)
            for side in (step.left, step.right)
        )
        return Piece("operator", step.operator, below=tuple(sides))
    return _call(task, step, inputs)


def _call(task: KeyTask, step: Call, inputs: Inputs) -> Piece:
    if step.method is with_mean_rows:
        return _piece(task, step.inputs[0][1][0], inputs)
    known = step.method.parameters
    own = {n for n in step.parameters if n in known and known[n].per_model}
    shared = tuple((n, value) for n, value in step.parameters.items() if n not in own)
    below = []
    if step.base is not None:
        below.append(_with(_piece(task, step.base, inputs), "base", ()))
    for argument, (name, members) in enumerate(step.inputs):
        for i, member in enumerate(members):
            given = tuple((n, step.parameters[n][i]) for n in step.parameters if n in own)
            piece = _piece(task, member, inputs)
            below.append(_with(piece, name if argument else "", () if argument else given))
    return Piece("method", step.method.name, values=shared, below=tuple(below))


def _with(piece: Piece, role: str, given: Values) -> Piece:
    """A piece below a method: what it is there, and the parameters that hold for it."""
    if piece.kind == "model":
        return Piece("model", piece.what, role, given, piece.place)
    if not role and not given:
        return piece
    return Piece("nested", "", role, given, below=(piece,))


def _model(task: KeyTask, leaf: int, inputs: Inputs) -> Piece:
    node, key, given = inputs.leaves[leaf], task.program.key, task.inputs[leaf]
    own = inputs.own_keys[leaf].get(key, key) if inputs.own_keys else key
    files: tuple[str, ...] = ()
    made = ""
    if isinstance(node, Leaf):
        own = node.checkpoint.renamed.get(own, own)
        found = (_file(node.checkpoint, part.source, part.info.file) for part in parts_of(given))
        files = tuple(dict.fromkeys(found))
        made = _made(given, node.checkpoint)
    return Piece("model", str(node), place=Place(own, files, made))


def _file(checkpoint: Checkpoint, source: int, file: str) -> str:
    return f"{short_name(checkpoint.source(source).url)}/{file}" if source else file


def _made(given: object, checkpoint: Checkpoint) -> str:
    """What a view does, in words."""
    if isinstance(given, LowRank):
        adapter = short_name(checkpoint.source(given.a.source).url)
        kind = "" if given.magnitude is None else " (DoRA)"
        return _and(_made(given.inner, checkpoint), f"with the adapter {adapter}{kind}")
    if isinstance(given, Shifted):
        return _and(_made(given.inner, checkpoint), "with the adapter's bias")
    if isinstance(given, Scaled):
        return "8-bit codes times scales"
    if isinstance(given, Unfilled):
        return _and(_made(given.members[0], checkpoint), "padded with the mean of its rows")
    if isinstance(given, Joined):
        inner = next(iter(given.members), None)
        return _and(_made(inner, checkpoint), f"joined from {len(given.members)} tensors")
    if isinstance(given, Slice):
        return _and(_made(given.inner, checkpoint), "a part of a tensor")
    if isinstance(given, Plain) and given.part.source:
        return "the adapter's own"
    return type(given).__name__ if isinstance(given, View) and not isinstance(given, Plain) else ""


def _and(first: str, then: str) -> str:
    return f"{first}, {then}" if first else then


def _plain(piece: Piece) -> dict[str, Any]:
    if piece.kind == "nested":
        return {**_plain(piece.below[0]), **_beside(piece)}
    if piece.kind == "number":
        return {"number": float(piece.what)}
    found: dict[str, Any] = {piece.kind: piece.what}
    if piece.kind == "method":
        found["parameters"] = {name: _jsonable(value) for name, value in piece.values}
    elif piece.place is not None:
        found |= {"key": piece.place.key, "files": list(piece.place.files)}
        found |= {"made": piece.place.made} if piece.place.made else {}
        found |= _beside(piece)
    if piece.below:
        found["of"] = [_plain(below) for below in piece.below]
    return found


def _beside(piece: Piece) -> dict[str, Any]:
    """What a method above gives to it."""
    found: dict[str, Any] = {"role": piece.role} if piece.role else {}
    given = {name: _jsonable(value) for name, value in piece.values}
    return found | ({"given": given} if given else {})


def _jsonable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
