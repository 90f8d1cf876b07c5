"""The boundary between a model's name and its pinned catalogue: reads headers, never tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distmerge.checkpoints import safetensors_header, torch_legacy, torch_zip
from distmerge.checkpoints.layout import (
    LARGEST_INDEX,
    Layout,
    choose_layout,
    listed,
    parse_index,
)
from distmerge.checkpoints.local_store import LocalStore
from distmerge.checkpoints.location import (
    HUB_SCHEME,
    INDEX_SUFFIXES,
    local_path,
    locate,
    redact,
)
from distmerge.checkpoints.parallel import IN_FLIGHT
from distmerge.checkpoints.store import StorageOptions, Store
from distmerge.checkpoints.tensors import Checkpoint, FileInfo, TensorInfo
from distmerge.errors import CheckpointNotFound, MalformedCheckpoint

LARGEST_CONFIG = 10_000_000
"""Bytes."""
_MODELS_AT_ONCE = 8
_MAGIC_BYTES = 512


def open_checkpoint(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    storage_options: StorageOptions | None = None,
) -> Checkpoint:
    """Pin a model and read its headers.

    `name` is a directory, a weight file, an index file, an fsspec URL, hf://org/name[@revision]
    or a bare Hub id; what exists on disk wins over a Hub id.

    Raises
        CheckpointNotFound, AccessDenied: it isn't there, or isn't yours to read.
        CheckpointError: it isn't a checkpoint.
        MalformedCheckpoint: its headers, index or config contradict themselves.
        ReadFailed: the network kept failing.
    """
    location = locate(name, revision=revision)
    url = redact(os.fspath(name))
    index = location.file if _is_index(location.file) else None
    only = None if index else location.file
    store = _store(location.root, storage_options, revision=location.revision, only=only)
    try:
        return _read_checkpoint(url, store, only, index)
    except CheckpointNotFound as error:
        if not location.bare:
            raise
        raise _neither_here_nor_there(url, error) from error
    except MalformedCheckpoint as error:
        raise type(error)(error.headline, *error.facts, f"in {url}", fix=error.fix) from error
    finally:
        store.close()


def open_checkpoints(
    names: Sequence[str | os.PathLike[str]], storage_options: StorageOptions | None = None
) -> list[Checkpoint]:
    """`open_checkpoint` for each name, at the same time. Raises the first name's error."""
    with ThreadPoolExecutor(_MODELS_AT_ONCE, thread_name_prefix="distmerge-open") as pool:
        opening = [
            pool.submit(open_checkpoint, name, storage_options=storage_options) for name in names
        ]
        return [future.result() for future in opening]


def open_store(
    root: str, storage_options: StorageOptions | None = None, *, revision: str | None = None
) -> Store:
    """The store of a checkpoint's `root` and `revision`, on any machine. Makes no request."""
    return _store(root, storage_options, revision=revision, only=None)


@dataclass(frozen=True, slots=True)
class _Head:
    """What one weight file says it holds."""

    file: str
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [*self.tensors, *self.aliases]


def _store(
    root: str, options: StorageOptions | None, *, revision: str | None, only: str | None
) -> Store:
    if root.startswith(HUB_SCHEME):
        from distmerge.checkpoints.hub_store import HubStore

        return HubStore(root, revision, options, only=only)
    if root.startswith("file://"):
        return LocalStore(local_path(root), only=only)
    if "://" in root or "::" in root:
        from distmerge.checkpoints.fsspec_store import FsspecStore

        return FsspecStore(root, options, only=only)
    return LocalStore(root, only=only)


def _is_index(file: str | None) -> bool:
    return file is not None and file.endswith(INDEX_SUFFIXES)


def _read_checkpoint(url: str, store: Store, only: str | None, index: str | None) -> Checkpoint:
    files = store.files()
    layout = _layout(files, url, only, index)
    weight_map = None
    weights = layout.weights
    if layout.index is not None:
        weight_map = _read_index(store, files, layout.index)
        weights = tuple(sorted(set(weight_map.values())))
    with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="distmerge-head") as pool:
        heads = list(pool.map(lambda path: _read_head(store, files[path]), weights))
    owners = _owners(heads, weight_map, layout.index)
    return Checkpoint(
        url=url,
        root=store.root,
        tensors={k: t for h in heads for k, t in h.tensors.items() if owners[k] == h.file},
        files=dict(files),
        revision=store.revision,
        config=_read_config(store, files),
        notices=(
            *layout.notices,
            *(notice for head in heads for notice in head.notices),
            *_unlisted(owners, weight_map, layout.index),
        ),
        aliases={a: k for h in heads for a, k in h.aliases.items() if owners[a] == h.file},
    )


def _layout(files: Mapping[str, FileInfo], url: str, only: str | None, index: str | None) -> Layout:
    if only is not None:
        return Layout((only,))
    if index is None:
        return choose_layout(files, url)
    if index not in files:
        raise CheckpointNotFound(f"There is no {index} at {url}.", fix="check the path")
    return Layout(index=index)


def _read(store: Store, file: FileInfo, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    store.read_into(file, start, memoryview(buffer))
    return bytes(buffer)


def _read_head(store: Store, file: FileInfo) -> _Head:
    """The catalogue of one file, by the format that its first bytes show."""

    def read(start: int, stop: int) -> bytes:
        return _read(store, file, start, stop)

    if file.path.endswith(".safetensors"):
        first = read(0, min(file.size, safetensors_header.FIRST_READ))
        tensors, _ = safetensors_header.read_header(read, file.size, file.path, first)
        return _Head(file.path, tensors)
    first = read(0, min(file.size, _MAGIC_BYTES))
    for is_format, read_catalogue in (
        (torch_zip.is_torch_zip, torch_zip.read_catalogue),
        (torch_legacy.is_torch_legacy, torch_legacy.read_catalogue),
    ):
        if is_format(first):
            found = read_catalogue(read, file.size, file.path)
            return _Head(file.path, found.tensors, found.aliases, tuple(found.notices))
    raise MalformedCheckpoint(
        f"{file.path} holds neither safetensors nor PyTorch weights.",
        f"it has {file.size} bytes and begins with {first[:16]!r}",
        fix="fetch the file again; if it is a git-lfs pointer: git lfs pull",
    )


def _read_index(store: Store, files: Mapping[str, FileInfo], index: str) -> dict[str, str]:
    size = files[index].size
    if size > LARGEST_INDEX:
        raise MalformedCheckpoint(
            f"{index} is too large for an index.", f"{size:,} of at most {LARGEST_INDEX:,} bytes"
        )
    return parse_index(_read(store, files[index], 0, size), index, files)


def _owners(
    heads: Sequence[_Head], weight_map: Mapping[str, str] | None, index: str | None
) -> dict[str, str]:
    """The one file that each name is taken from: the only one that has it, or the index's."""
    holders: dict[str, list[str]] = {}
    for head in heads:
        for name in head.names:
            holders.setdefault(name, []).append(head.file)
    said = weight_map or {}
    wrong = [name for name, file in said.items() if file not in holders.get(name, ())]
    if wrong:
        raise MalformedCheckpoint(
            f"{index} names {len(wrong)} tensors that their files don't hold.",
            f"{wrong[0][:200]} is said to be in {said[wrong[0]]}",
            fix="fetch or copy the checkpoint again, whole",
        )
    twice = [name for name, files in holders.items() if len(files) > 1 and name not in said]
    if twice:
        raise MalformedCheckpoint(
            f"{len(twice)} tensors are in more than one file, and no index says which counts.",
            f"{twice[0][:200]} is in {listed(holders[twice[0]])}",
            fix="name the one file that is meant",
        )
    return {name: said.get(name, files[0]) for name, files in holders.items()}


def _unlisted(
    owners: Mapping[str, str], weight_map: Mapping[str, str] | None, index: str | None
) -> tuple[str, ...]:
    extra = [name for name in owners if weight_map is not None and name not in weight_map]
    if not extra:
        return ()
    return (
        f"{len(extra)} tensors that {index} doesn't list were found in its files and are used: "
        f"{listed(extra)}.",
    )


def _read_config(store: Store, files: Mapping[str, FileInfo]) -> dict[str, Any] | None:
    file = files.get("config.json")
    if file is None:
        return None
    if file.size > LARGEST_CONFIG:
        raise MalformedCheckpoint(f"config.json is too large: {file.size:,} bytes.")
    try:
        config = json.loads(_read(store, file, 0, file.size))
    except (ValueError, RecursionError) as error:
        raise MalformedCheckpoint("config.json is not JSON.", str(error)[:200]) from error
    if not isinstance(config, dict):
        raise MalformedCheckpoint("config.json is not a JSON object.")
    return config


def _neither_here_nor_there(name: str, error: CheckpointNotFound) -> CheckpointNotFound:
    return CheckpointNotFound(
        f"There is no model {name!r}, here or on the Hub.",
        f"no such file or directory in {Path.cwd()}",
        error.headline,
        *error.facts,
        fix=error.fix,
    )
