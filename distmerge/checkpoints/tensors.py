"""What a checkpoint's headers say: where each tensor lies, and nothing of its values."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from distmerge.checkpoints.views import View

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
"""safetensors' dtype names that can be merged or copied, with the bytes of one element."""

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


class Shaped:
    """What follows from a tensor's dtype and shape."""

    __slots__ = ()
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as a row-major array."""
        return self.elements * DTYPE_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_DTYPES


@dataclass(frozen=True, slots=True)
class TensorInfo(Shaped):
    """One tensor's place. Holds no data.

    `strides` is None for a row-major tensor; otherwise `start:stop` spans the part of the
    storage that the view touches and the strides, in elements, say how to walk it.
    """

    dtype: str
    """safetensors' name, such as BF16."""
    shape: tuple[int, ...]
    file: str
    """Path inside the checkpoint, with forward slashes."""
    start: int
    """First byte in the file, absolute."""
    stop: int
    """One past the last byte in the file, absolute."""
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a checkpoint as it was when the checkpoint was opened."""

    path: str
    """Path inside the checkpoint, with forward slashes."""
    size: int
    """Bytes."""
    tag: str
    """What changes when the file does: Hub blob id, S3 ETag, size and mtime."""
    version: str | None = None
    """S3 version id, where the bucket keeps versions: these bytes can be read under it even after
    the file was replaced."""


@dataclass(frozen=True)
class Checkpoint:
    """Headers of one model, pinned. Picklable, holds no tensor and no secret."""

    url: str
    """As it was named, without credentials."""
    root: str
    """What `open_store` takes to read the files: a directory path or URL; a single-file
    checkpoint has its parent directory here."""
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    """In the order of the files' headers."""
    files: Mapping[str, FileInfo] = field(repr=False)
    """Every file of the repository or directory, weights and others; for a checkpoint that
    was named as a single file, that file alone."""
    revision: str | None = None
    """Hub commit, where there is one."""
    config: Mapping[str, Any] | None = field(default=None, repr=False)
    """config.json, parsed."""
    notices: tuple[str, ...] = ()
    """Sentences that the user should see (a file read whole, an alias resolved)."""
    aliases: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Names that share another key's storage (tied tensors): alias -> the key that is in
    `tensors`."""
    views: Mapping[str, View] = field(default_factory=dict, repr=False)
    """Keys whose values are made as they are read (dequantised, with an adapter's share)."""
    used: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Keys of `tensors` that only views read -> what they are there."""
    others: tuple[Checkpoint, ...] = ()
    """Further checkpoints that views read: adapters."""
    borrowed: tuple[Checkpoint, ...] = field(default=(), repr=False)
    """Other models of the same merge of which views read rows, their adapters after each."""
    settings: str = ""
    """What else the views' values depend on, and how keys were renamed."""
    renamed: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Keys that a user's rules renamed -> what the files call them."""
    warnings: tuple[str, ...] = ()
    """Sentences on what was asked for and had no effect."""
    spool: str | None = None
    """Where its bytes are kept for further readers, if they are: see `checkpoints/spool.py`."""

    @property
    def own_url(self) -> str:
        """The URL without its adapters'."""
        url = self.url
        for other in reversed(self.others):
            url = url.removesuffix(f"+{other.url}")
        return url

    @property
    def is_lone_file(self) -> bool:
        """Was it named as one file, so that nothing beside it is a part of it?"""
        name = self.own_url.rpartition("/")[2]
        return list(self.files) in ([name], [unquote(name)])

    def source(self, number: int) -> Checkpoint:
        """The checkpoint that a view's part is in: itself, one of the others, or borrowed."""
        return (self, *self.others, *self.borrowed)[number]

    def spooled(self, place: str) -> Checkpoint:
        """The same, read through a spool, adapters too."""
        others = tuple(other.spooled(place) for other in self.others)
        return replace(self, spool=place, others=others)

    @property
    def presented(self) -> dict[str, TensorInfo | View]:
        """The model's tensors as merges see them."""
        own = {k: self.views.get(k, info) for k, info in self.tensors.items() if k not in self.used}
        return {**own, **{k: view for k, view in self.views.items() if k not in own}}

    @property
    def fingerprint(self) -> str:
        """Hash of what was pinned: the weight files' paths, sizes and tags, adapters'
        too."""
        weights = sorted({info.file for info in self.tensors.values()})
        lines = [f"{f} {self.files[f].size} {self.files[f].tag}" for f in weights]
        lines += [f"with {other.fingerprint}" for other in self.others]
        lines += [self.settings] if self.settings else []
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())
