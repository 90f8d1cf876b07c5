"""What of the donor's files doesn't come along as it seems to: warnings of the plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from distmerge.checkpoints.heads import read_bytes, read_json
from distmerge.checkpoints.layout import listed
from distmerge.checkpoints.local_store import LocalStore
from distmerge.checkpoints.tensors import Checkpoint, FileInfo
from distmerge.errors import MalformedCheckpoint, shown
from distmerge.expressions.request import MergeRequest
from distmerge.expressions.tokenizer_files import NAMES
from distmerge.write.donor_files import files_to_copy

LARGEST_READ = 1 << 20
"""Bytes of JSON above which only the end is looked at: a vocabulary takes long to read."""


def with_beside(request: MergeRequest) -> MergeRequest:
    """The request with warnings of a donor on this machine; of others no more is read."""
    if request.files_from is None:
        return request
    replaced = request.tokenizer.replaced if request.tokenizer else frozenset()
    donor = request.files_from.checkpoint
    if "://" in donor.root or "::" in donor.root or donor.is_lone_file:
        return request
    store = LocalStore(donor.root)
    found = (*_left_out(store, donor), *_broken(store, donor, replaced))
    return replace(request, warnings=(*request.warnings, *found))


def _left_out(store: LocalStore, donor: Checkpoint) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for path, kind in store.left_out().items():
        if path == "config.json" or files_to_copy({path: FileInfo(path, 0, "")}):
            found.setdefault(kind, []).append(shown(path))
    for kind, paths in found.items():
        are = f"is {kind}, and isn't" if len(paths) == 1 else f"are each {kind}, and aren't"
        yield f"{listed(paths)} of {donor.url} {are} copied."


def _broken(store: LocalStore, donor: Checkpoint, replaced: frozenset[str]) -> Iterator[str]:
    for path in NAMES:
        file = donor.files.get(path)
        if file is None or path in replaced or not path.endswith(".json"):
            continue
        if not _is_json(store, file):
            yield f"{path} of {donor.url} is no JSON object, and is copied as it is."


def _is_json(store: LocalStore, file: FileInfo) -> bool:
    if file.size > LARGEST_READ:
        return read_bytes(store, file, file.size - 64, file.size).rstrip().endswith(b"}")
    try:
        read_json(store, file)
    except MalformedCheckpoint:
        return False
    return True
