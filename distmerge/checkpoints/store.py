"""The seam between checkpoints and where their bytes live: local disk, fsspec, the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from distmerge.checkpoints.tensors import FileInfo

StorageOptions = Mapping[str, Any]
"""fsspec's word for a filesystem's keyword arguments (endpoint, credentials). It travels beside
checkpoints and recipes, never inside them, and is never logged."""


class Store(Protocol):
    """Reads one checkpoint's files. Thread-safe; every read is whole or raises.

    Raises
        SourceChanged: the file no longer has the tag it was pinned with.
        ReadFailed: retries are used up; names file, range and cause.
        CheckpointNotFound, AccessDenied: at `files()` or at a read.
    """

    root: str
    revision: str | None

    def files(self) -> Mapping[str, FileInfo]:
        """Every file below the root, by path (no directories), sorted by path."""
        ...

    def read_into(self, file: FileInfo, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start` on."""
        ...

    def close(self) -> None: ...


class OutputStore(Protocol):
    """Writes one output. Nothing is visible under a name before it is whole.

    Stores that can, keep everything apart until `publish`; elsewhere what is written is there.
    """

    root: str
    heartbeat: float
    """Seconds between a lease's renewals here."""
    spools: bool
    """Does a shard wait on this machine's disk until it is whole, and go to its place then?"""

    buffers: int
    """Bytes of memory that one large file takes while it is written."""

    def begin(self, digest: str) -> None:
        """Name the merge that is written, before the first write."""
        ...

    def publish(self, title: str, text: str) -> str | None:
        """What was written becomes the output. The URL to read it from, if it isn't the root's.

        title, text: for people who look at the place's history, where there is one.
        """
        ...

    def is_file(self) -> bool:
        """Is there a file in the place where the output's folder would be?"""
        ...

    def folders_among(self, paths: Iterable[str]) -> list[str]:
        """Those of the paths that are folders, so that no file can have the name."""
        ...

    def exists(self, path: str) -> bool: ...

    def list(self, prefix: str = "") -> Mapping[str, FileInfo]:
        """Files (with sizes and tags) whose path starts with `prefix`."""
        ...

    def read_bytes(self, path: str) -> bytes: ...

    def write_bytes(self, path: str, data: bytes) -> None:
        """Atomically create or replace one small file."""
        ...

    def open_write(self, path: str) -> PendingFile:
        """Begin a large file. It stays invisible until `commit`."""
        ...

    def delete(self, path: str) -> None:
        """Remove one file; a missing one is no error."""
        ...

    def move(self, path: str, to: str) -> None:
        """Give a whole file another name; nobody sees half of it under either."""
        ...

    def remove_below(self, folder: str) -> None:
        """Remove every file below a folder, which ends with a slash."""
        ...

    def remove_temporaries(self) -> int:
        """Sweep what killed runs left unfinished; for the holder of the lease."""
        ...

    def free_bytes(self) -> int | None:
        """Room left, where that is known; with `spools`, for shards that wait."""
        ...


class PendingFile(Protocol):
    """A file being written. Exactly one of `commit` and `discard` ends it."""

    def write(self, data: memoryview) -> None:
        """Append; the buffer may be reused as soon as this returns."""
        ...

    def commit(self) -> None:
        """Make it durable and visible under its path, atomically."""
        ...

    def discard(self) -> None:
        """Drop it and everything it left behind; safe to call twice."""
        ...
