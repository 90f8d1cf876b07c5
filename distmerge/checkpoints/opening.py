"""The boundary between a model's name and its pinned catalogue: reads headers, never tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distmerge.checkpoints.adapter import with_adapter
from distmerge.checkpoints.adapter_config import AdapterConfig, read_adapter_config
from distmerge.checkpoints.heads import owners_of, read_bytes, read_head, read_json
from distmerge.checkpoints.layout import (
    LARGEST_INDEX,
    WHOLE,
    Layout,
    choose_layout,
    listed,
    parse_index,
)
from distmerge.checkpoints.local_store import LocalStore
from distmerge.checkpoints.location import (
    HUB_SCHEME,
    INDEX_SUFFIXES,
    Location,
    local_path,
    locate,
    split_adapter,
)
from distmerge.checkpoints.parallel import IN_FLIGHT
from distmerge.checkpoints.renaming import Rule, renamed
from distmerge.checkpoints.scales import dequantised
from distmerge.checkpoints.spool import SpooledStore
from distmerge.checkpoints.storage_options import options_for
from distmerge.checkpoints.store import StorageOptions, Store
from distmerge.checkpoints.tensors import Checkpoint, FileInfo
from distmerge.credentials import redact
from distmerge.errors import CheckpointError, CheckpointNotFound, MalformedCheckpoint, ReadFailed

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_CONFIG = "adapter_config.json"
_MODELS_AT_ONCE = 8


def open_checkpoint(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    adapter: Location | None = None,
    rename: Sequence[Rule] = (),
    storage_options: StorageOptions | None = None,
) -> Checkpoint:
    """Pin a model and read its headers.

    `name` is a directory, a weight file, an index file, an fsspec URL, hf://org/name[@revision]
    or a bare Hub id; what exists on disk wins over a Hub id. `base+adapter` is a model with a LoRA
    adapter, which `adapter` may give apart. `rename` says what its keys are called instead; an
    adapter is fitted to the names that the files have.

    Raises
        CheckpointNotFound, AccessDenied: it isn't there, or isn't yours to read.
        CheckpointError: it isn't a checkpoint.
        MalformedCheckpoint: its headers, index or config contradict themselves.
        KeyMismatch: `rename` gives two tensors one name.
        ReadFailed: the network kept failing.
    """
    location = locate(name, revision=revision)
    adapter = adapter or location.adapter
    url = redact(split_adapter(os.fspath(name))[0])
    found = _open_model(location, url, options_for(location.root, storage_options))
    if adapter is not None:
        weights, config = open_adapter(adapter, options_for(adapter.root, storage_options))
        found = with_adapter(found, weights, config)
    return renamed(found, rename)


def open_adapter(
    location: Location, storage_options: StorageOptions | None = None
) -> tuple[Checkpoint, AdapterConfig]:
    """Pin a LoRA adapter and read its headers and its adapter_config.json.

    Raises
        CheckpointError and its kinds: it isn't there, or asks for what isn't known.
    """
    root, revision = location.root, location.revision
    url = root.removeprefix(HUB_SCHEME) if location.bare else redact(root)
    url += f"@{revision}" if revision else ""
    store = _store(root, storage_options, revision=revision, only=None)
    try:
        files = store.files()
        weights = next((name for name in ADAPTER_WEIGHTS if name in files), "")
        if not weights or ADAPTER_CONFIG not in files:
            raise CheckpointError(
                f"{url} is not an adapter.",
                f"it lacks {ADAPTER_CONFIG if weights else 'adapter_model.safetensors'}",
                fix="name the folder that peft's save_pretrained() wrote",
            )
        config = read_adapter_config(read_json(store, files[ADAPTER_CONFIG]), url)
        head = read_head(store, files[weights])
    except MalformedCheckpoint as error:
        raise type(error)(error.headline, *error.facts, f"in {url}", fix=error.fix) from error
    finally:
        store.close()
    tensors = {**head.tensors, **{a: head.tensors[k] for a, k in head.aliases.items()}}
    return Checkpoint(url, store.root, tensors, dict(files), store.revision), config


def _open_model(location: Location, url: str, storage_options: StorageOptions) -> Checkpoint:
    index = location.file if _is_index(location.file) else None
    only = None if index else location.file
    store = _store(location.root, storage_options, revision=location.revision, only=only)
    try:
        return _read_checkpoint(url, store, only, index)
    except CheckpointNotFound as error:
        if not location.bare:
            raise
        raise _neither_here_nor_there(url, error) from error
    except ReadFailed as error:
        if not location.bare:
            raise
        here = f"there is no {url!r} in {Path.cwd()}, so the Hub was asked"
        fix = f"for a folder: check its path; for a model on the Hub: {error.fix}"
        raise ReadFailed(error.headline, here, *error.facts, fix=fix) from error
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
    root: str,
    storage_options: StorageOptions | None = None,
    *,
    revision: str | None = None,
    spool: str | None = None,
) -> Store:
    """The store of a checkpoint's `root` and `revision`, on any machine, read through its `spool`
    if it has one. Makes no request."""
    store = _store(root, storage_options, revision=revision, only=None)
    return store if spool is None else SpooledStore(store, spool)


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
        heads = list(pool.map(lambda path: read_head(store, files[path]), weights))
    owners = owners_of(heads, weight_map, layout.index)
    found = Checkpoint(
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
    return dequantised(found)


def _layout(files: Mapping[str, FileInfo], url: str, only: str | None, index: str | None) -> Layout:
    if only is not None:
        return Layout((only,))
    if index is None:
        return choose_layout(files, url)
    if index not in files:
        raise CheckpointNotFound(f"There is no {index} at {url}.", fix="check the path")
    return Layout(index=index)


def _read_index(store: Store, files: Mapping[str, FileInfo], index: str) -> dict[str, str]:
    size = files[index].size
    if size > LARGEST_INDEX:
        raise MalformedCheckpoint(
            f"{index} is too large for an index.",
            f"{size:,} of at most {LARGEST_INDEX:,} bytes",
            fix=WHOLE,
        )
    return parse_index(read_bytes(store, files[index], 0, size), index, files)


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
    return None if file is None else read_json(store, file)


def _neither_here_nor_there(name: str, error: CheckpointNotFound) -> CheckpointNotFound:
    return CheckpointNotFound(
        f"There is no model {name!r}, here or on the Hub.",
        f"no such file or directory in {Path.cwd()}",
        error.headline,
        *error.facts,
        fix=error.fix,
    )
