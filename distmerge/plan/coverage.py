"""Every tensor of every input is read, or listed with the reason why not; anything else is an
error: weights that vanish without a word are the worst that a merge can do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from distmerge.errors import KeyMismatch
from distmerge.expressions.alignment import Inputs, Skipped
from distmerge.expressions.layers import Path, outer_key
from distmerge.expressions.nodes import Leaf, TensorLeaf
from distmerge.expressions.problems import SHOWN
from distmerge.expressions.program import Program

Input = Leaf | TensorLeaf


def account(
    inputs: Inputs, programs: Sequence[Program], *, whole: bool = True
) -> tuple[Skipped, ...]:
    """The tensors that go nowhere, each once, with its reason.

    whole: are these all the programs of the merge?

    Raises
        KeyMismatch: a tensor that is neither read nor has a reason.
    """
    written = {program.key: program for program in programs}
    used = _used(inputs, programs)
    skipped = list(inputs.skipped)
    for leaf, aligned in inputs.aligned.items():
        paths = _paths(inputs, leaf)
        for key, own in aligned.items():
            if own not in used[leaf]:
                reason = _reason(key, paths, written, inputs)
                skipped.append(Skipped(str(leaf), own, reason))
    if whole:
        _check(inputs, used, skipped)
    return tuple(_as_in_files(skipped, inputs))


def _as_in_files(skipped: Sequence[Skipped], inputs: Inputs) -> Iterator[Skipped]:
    """The tensors under the names that the files have, where a user's rules renamed them."""
    found = {
        str(leaf): leaf.checkpoint.renamed for leaf in inputs.aligned if isinstance(leaf, Leaf)
    }
    for entry in skipped:
        key = found.get(entry.model, {}).get(entry.key, entry.key)
        yield replace(entry, key=key)


def _used(inputs: Inputs, programs: Sequence[Program]) -> dict[Input, set[str]]:
    """For each input, which of its tensors are read, as it spells them."""
    used: dict[Input, set[str]] = {leaf: set() for leaf in inputs.aligned}
    for program in programs:
        for leaf in program.leaves:
            own = inputs.own_keys[leaf] if inputs.own_keys else {}
            used[inputs.leaves[leaf]].add(own.get(program.key, program.key))
    return used


def _paths(inputs: Inputs, leaf: Input) -> list[Path]:
    pairs = zip(inputs.leaves, inputs.paths or [()] * len(inputs.leaves), strict=True)
    return [path for other, path in pairs if other == leaf]


def _reason(key: str, paths: Sequence[Path], written: Mapping[str, Program], inputs: Inputs) -> str:
    outside = [outer_key(path, key) for path in paths]
    taken = [written[outer] for outer in outside if outer is not None and outer in written]
    if taken and any(paths):
        names = dict.fromkeys(str(inputs.leaves[leaf]) for leaf in taken[0].leaves)
        return f"taken from {', '.join(names)}"
    if taken:
        return "its key is written without this model (an on_... key, or passthrough)"
    if all(outer is None for outer in outside):
        return "outside layer_range"
    if _shapes_differ([outer for outer in outside if outer is not None], inputs):
        return "its shape differs between models (on_shape_mismatch)"
    return "not in every model (on_missing)"


def _shapes_differ(keys: Sequence[str], inputs: Inputs) -> bool:
    places = range(len(inputs.tensors))
    return any(
        len({inputs.spec(i, key)[1] for i in places if key in inputs.tensors[i]}) > 1
        for key in keys
    )


def _check(inputs: Inputs, used: Mapping[Input, set[str]], skipped: Sequence[Skipped]) -> None:
    listed: dict[str, set[str]] = {}
    for entry in skipped:
        listed.setdefault(entry.model, set()).add(entry.key)
    lost = [
        f"{key} of {leaf}"
        for leaf in inputs.aligned
        for key in (leaf.checkpoint.tensors if isinstance(leaf, Leaf) else leaf.tensors)
        if key not in used[leaf] and key not in listed.get(str(leaf), ())
    ]
    if lost:
        raise KeyMismatch(
            f"{len(lost)} tensors would be lost: neither merged nor left out for a reason.",
            *lost[:SHOWN],
            fix="this is a mistake in distmerge: please report it with the recipe",
        )
