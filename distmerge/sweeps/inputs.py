"""Which bytes of which files the candidates of a sweep read: arithmetic on plans, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from distmerge.checkpoints.location import is_remote
from distmerge.checkpoints.ranges import Span, coalesce
from distmerge.checkpoints.tensors import Checkpoint, FileInfo
from distmerge.checkpoints.views import parts_of
from distmerge.expressions.nodes import Leaf
from distmerge.plan.plan import Plan
from distmerge.run.fetch import GAP
from distmerge.write.donor_files import files_to_copy

Range = tuple[str, FileInfo, int, int]
"""A checkpoint's root, the file, first byte and one past the last."""


def bytes_once(plans: Iterable[Plan]) -> int:
    """Bytes of the inputs of several plans, those that several read counted once."""
    return sum(stop - start for _, _, start, stop in read_ranges(plans))


def read_ranges(plans: Iterable[Plan]) -> set[Range]:
    """What merging these reads."""
    found: set[Range] = set()
    for plan in plans:
        for unit in plan.units:
            for task in unit.tasks:
                for leaf, given in task.inputs.items():
                    for part in parts_of(given):
                        source, info = unit.sources[leaf, part.source], part.info
                        found.add((source.root, source.files[info.file], info.start, info.stop))
    return found


def remote_spans(
    plans: Sequence[Plan], *, comparing: bool
) -> Mapping[tuple[str, FileInfo], list[Span]]:
    """What is read over a network, as it is read: with what lies between, and the donor's small
    files. comparing: with what candidates are compared with."""
    spans: dict[tuple[str, FileInfo], list[Span]] = {}
    found = read_ranges(plans) | set(_beside(plans))
    found |= set(_parents(plans)) if comparing else set()
    for root, file, start, stop in found:
        if is_remote(root):
            spans.setdefault((root, file), []).append((start, stop))
    return {place: coalesce(several, gap=GAP) for place, several in spans.items()}


def _beside(plans: Sequence[Plan]) -> Iterator[Range]:
    """The other files of the models that give them."""
    donors = {plan.request.files_from for plan in plans}
    for donor in donors:
        if donor is not None:
            checkpoint = donor.checkpoint
            for file in files_to_copy(checkpoint.files):
                yield checkpoint.root, file, 0, file.size


def _parents(plans: Sequence[Plan]) -> Iterator[Range]:
    """Every model's tensors that the candidates have too."""
    wanted: dict[Leaf, set[str]] = {}
    tensors: dict[Leaf, Mapping[str, object]] = {}
    for plan in plans:
        for leaf, own in zip(plan.inputs.leaves, plan.inputs.tensors, strict=True):
            if isinstance(leaf, Leaf):
                wanted.setdefault(leaf, set()).update(plan.sizes)
                tensors.setdefault(leaf, own)
    for leaf, keys in wanted.items():
        for key in keys & set(tensors[leaf]):
            for part in parts_of(tensors[leaf][key]):
                source: Checkpoint = leaf.checkpoint.source(part.source)
                yield source.root, source.files[part.info.file], part.info.start, part.info.stop
