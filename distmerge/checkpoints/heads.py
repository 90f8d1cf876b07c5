"""Between one file of a checkpoint and what it says it holds: headers, and small JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distmerge.checkpoints import safetensors_header, torch_legacy, torch_zip
from distmerge.checkpoints.layout import WHOLE, gguf, listed
from distmerge.checkpoints.store import Store
from distmerge.checkpoints.tensors import FileInfo, TensorInfo
from distmerge.errors import MalformedCheckpoint

LARGEST_CONFIG = 10_000_000
"""Bytes."""
_MAGIC_BYTES = 512


@dataclass(frozen=True, slots=True)
class Head:
    """What one weight file says it holds."""

    file: str
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [*self.tensors, *self.aliases]


def read_bytes(store: Store, file: FileInfo, start: int, stop: int) -> bytes:
    """Some bytes of a file."""
    buffer = bytearray(stop - start)
    store.read_into(file, start, memoryview(buffer))
    return bytes(buffer)


def read_head(store: Store, file: FileInfo) -> Head:
    """The catalogue of one file, by the format that its first bytes show."""

    def read(start: int, stop: int) -> bytes:
        return read_bytes(store, file, start, stop)

    if file.path.endswith(".safetensors"):
        first = read(0, min(file.size, safetensors_header.FIRST_READ))
        tensors, _ = safetensors_header.read_header(read, file.size, file.path, first)
        return Head(file.path, tensors)
    first = read(0, min(file.size, _MAGIC_BYTES))
    for is_format, read_catalogue in (
        (torch_zip.is_torch_zip, torch_zip.read_catalogue),
        (torch_legacy.is_torch_legacy, torch_legacy.read_catalogue),
    ):
        if is_format(first):
            found = read_catalogue(read, file.size, file.path)
            return Head(file.path, found.tensors, found.aliases, tuple(found.notices))
    if first[:4] == b"GGUF":
        raise gguf(file.path)
    raise MalformedCheckpoint(
        f"{file.path} holds neither safetensors nor PyTorch weights.",
        f"it has {file.size} bytes and begins with {first[:16]!r}",
        fix="fetch the file again; if it is a git-lfs pointer: git lfs pull",
    )


def read_json(store: Store, file: FileInfo) -> dict[str, Any]:
    """A small JSON file. Raises MalformedCheckpoint if it isn't an object."""
    if file.size > LARGEST_CONFIG:
        raise MalformedCheckpoint(f"{file.path} is too large: {file.size:,} bytes.", fix=WHOLE)
    return parse_json(read_bytes(store, file, 0, file.size), file.path)


def parse_json(content: bytes, file: str) -> dict[str, Any]:
    """What a JSON file holds. Raises MalformedCheckpoint if it isn't an object."""
    try:
        found = json.loads(content)
        # Python lets half a surrogate pair through, which nothing could write again.
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise MalformedCheckpoint(
            f"{file} is not valid Unicode.", str(error)[:200], fix=WHOLE
        ) from error
    except (ValueError, RecursionError) as error:
        raise MalformedCheckpoint(f"{file} is not JSON.", str(error)[:200], fix=WHOLE) from error
    if not isinstance(found, dict):
        holds = f"it holds a {type(found).__name__}"
        raise MalformedCheckpoint(f"{file} is not a JSON object.", holds, fix=WHOLE)
    return found


def owners_of(
    heads: Sequence[Head], weight_map: Mapping[str, str] | None, index: str | None
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
