"""One shard on its way out: windows of merged bytes in file order, hashed as they are written."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import xxhash
from torch import Tensor

from distmerge.checkpoints.store import OutputStore, PendingFile
from distmerge.checkpoints.tensors import FileInfo
from distmerge.errors import OutputError
from distmerge.write.manifest import checksum_text

STAGING = ".distmerge"
"""Folder of an output for everything that isn't part of it yet."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that a shard is whole: written after it, under the plan's digest."""

    shard: str
    size: int
    """Bytes, header included."""
    checksum: str
    changed: int = 0
    """Elements that the merge, in float32, moved away from the base."""
    lost: int = 0
    """Those of them that rounding to the output dtype moved back."""
    bytes_read: int = 0
    peak_memory: int = 0
    """The worker's high-water mark, bytes; 0 where it isn't known."""
    node: str = ""
    """Where on a cluster it was written."""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def receipt_path(digest: str, shard: str) -> str:
    """Where a shard's receipt lies in the output."""
    return f"{STAGING}/{digest}/{shard}.json"


def read_receipt(
    output: OutputStore, files: Mapping[str, FileInfo], digest: str, shard: str, path: str
) -> Receipt | None:
    """The receipt of a shard, if there is a readable one and at `path` the file it speaks of.

    files: what the output holds.
    """
    receipt = receipt_path(digest, shard)
    if receipt not in files or path not in files:
        return None
    try:
        found = Receipt(**json.loads(output.read_bytes(receipt)))
    except (ValueError, TypeError):  # cut short when its writer was killed: as good as none
        return None
    return found if files[path].size == found.size else None


class ShardWriter:
    """Writes in its own thread, so that the next window is merged meanwhile.

    `buffer` hands out one of `windows` and waits while all are in use: what is written more
    slowly than it is merged holds the merge up instead of filling memory.
    """

    def __init__(
        self, pending: PendingFile, header: bytes, windows: Iterable[Tensor], size: int
    ) -> None:
        """size: bytes that the file has once it is whole."""
        self._pending = pending
        self._whole = size
        self._hash = xxhash.xxh3_128()
        self.size = 0
        self._free: queue.Queue[Tensor] = queue.Queue()
        for window in windows:
            self._free.put(window)
        self._full: queue.Queue[tuple[Tensor | None, int]] = queue.Queue()
        self._error: BaseException | None = None
        self._append(memoryview(header))
        self._thread = threading.Thread(target=self._run, name="distmerge-write", daemon=True)
        self._thread.start()

    def _append(self, data: memoryview) -> None:
        self._hash.update(data)
        self._pending.write(data)
        self.size += len(data)

    def _run(self) -> None:
        while True:
            window, nbytes = self._full.get()
            if window is None:
                return
            try:
                if self._error is None:
                    self._append(memoryview(window.numpy().data)[:nbytes])
            except BaseException as error:
                self._error = error
            self._free.put(window)

    def buffer(self) -> Tensor:
        """A window of bytes to fill.

        Raises whatever writing an earlier window raised.
        """
        window = self._free.get()
        self._check()
        return window

    def write(self, window: Tensor, nbytes: int) -> None:
        """Queue the first `nbytes` of a window; it must not be touched any more."""
        self._full.put((window, nbytes))

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        if self._thread.is_alive():
            self._full.put((None, 0))
            self._thread.join()

    def commit(self) -> str:
        """Make the shard durable and visible; its checksum.

        Raises
            OutputError: more or fewer bytes came than its header speaks of.
        """
        self._join()
        self._check()
        if self.size != self._whole:
            raise OutputError(
                f"A shard came to {self.size:,} bytes, and its header speaks of {self._whole:,}.",
                "nothing of it is kept: this is a fault of distmerge's",
                fix="report it, with the recipe and the shapes of its tensors",
            )
        self._pending.commit()
        return checksum_text(self._hash)

    def discard(self) -> None:
        """Leave nothing behind, after a failed `commit` too."""
        self._join()
        self._pending.discard()
