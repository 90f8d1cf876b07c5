"""The boundary between a finished merge and whoever asks later where it came from.

`distmerge.json` says what was computed, from which pinned inputs, with what, and the checksum of
every file beside it, its own included but for the log of events. It never holds credentials.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from typing import Annotated, Any, Literal

import xxhash
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from distmerge.checkpoints.tensors import Checkpoint
from distmerge.credentials import redact
from distmerge.errors import VerificationFailed

MANIFEST_FILE = "distmerge.json"
EVENTS_FILE = "distmerge.events.jsonl"
"""What happened in the run that wrote the output: no two runs have the same."""
FORMAT_VERSION = 1

_ALGORITHM = "xxh3_128"
_UNSET = f"{_ALGORITHM}:{'0' * 32}"
_OWN_CHECKSUM = re.compile(rb'(?<="checksum": ")xxh3_128:[0-9a-f]{32}(?="\n\}\n\Z)')
_RECORDED_LIBRARIES = (
    "distmerge",
    "torch",
    "safetensors",
    "transformers",
    "huggingface_hub",
    "numpy",
    "ray",
    "fsspec",
    "s3fs",
)


def checksum(data: bytes | bytearray | memoryview) -> str:
    """`xxh3_128:` and the hash in hexadecimal."""
    return checksum_text(xxhash.xxh3_128(data))


def checksum_text(hasher: xxhash.xxh3_128) -> str:
    """The same for a hash that was fed piece by piece."""
    return f"{_ALGORITHM}:{hasher.hexdigest()}"


def library_versions() -> dict[str, str]:
    """The Python and the installed libraries that a merge's result can depend on."""
    versions = {"python": platform.python_version()}
    for name in _RECORDED_LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


PublicText = Annotated[str, AfterValidator(redact)]
"""Text that credentials are taken out of when it is stored."""

Checksum = Annotated[str, Field(pattern=rf"^{_ALGORITHM}:[0-9a-f]{{32}}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PinnedFile(_Record):
    """An input file as it was when the input was opened."""

    size: int = Field(ge=0)
    """Bytes."""
    tag: str
    """ETag, Hub blob id, or size and time."""
    version: str | None = None
    """S3 version id, where the bucket keeps versions."""


class InputRecord(_Record):
    """One pinned input."""

    url: PublicText
    revision: str | None = None
    fingerprint: str
    files: dict[str, PinnedFile]
    """The weight files that the fingerprint covers, by path."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> InputRecord:
        """The record of an opened checkpoint."""
        weights = sorted({info.file for info in checkpoint.tensors.values()})
        pinned = {path: checkpoint.files[path] for path in weights}
        return cls(
            url=checkpoint.url,
            revision=checkpoint.revision,
            fingerprint=checkpoint.fingerprint,
            files={
                path: PinnedFile(size=f.size, tag=f.tag, version=f.version)
                for path, f in pinned.items()
            },
        )


class ShardRecord(_Record):
    """One weight file of the output."""

    file: str
    size: int = Field(ge=0)
    """Bytes, header included."""
    checksum: Checksum
    tensors: list[str]
    """Keys."""


class SkippedTensor(_Record):
    """An input tensor that went into nothing, and why."""

    model: PublicText
    key: str
    reason: str


class Manifest(_Record):
    """`distmerge.json`."""

    format_version: Literal[1] = 1
    distmerge_version: str
    expression: PublicText
    """The formula that was computed."""
    digest: str
    recipe: PublicText | None = None
    """The recipe's text, where there was one."""
    seed: int
    inputs: list[InputRecord]
    versions: dict[str, str] = Field(default_factory=library_versions)
    kernel: str
    """CPU capability or device class that the arithmetic ran on."""
    out_dtype: str | None = None
    """What was asked for; None when each tensor kept the base's."""
    shards: list[ShardRecord]
    files: dict[str, Checksum]
    """Every other file of the output but this one: path -> checksum."""
    mappings: list[PublicText] = Field(default_factory=list)
    """Keys of inputs that were matched under another name, a sentence each."""
    skipped: list[SkippedTensor] = Field(default_factory=list)
    lost_delta_share: float | None = None
    """Share of the task vectors' changes that rounding to the output dtype undid, 0 to 1."""
    methods: dict[str, str]
    """Merge method -> hash of its source."""
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))

    def to_json(self) -> bytes:
        """The file's bytes. Its last field is a checksum over all of them, itself set to 0."""
        fields: dict[str, Any] = {**self.model_dump(mode="json"), "checksum": _UNSET}
        blank = (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
        return _OWN_CHECKSUM.sub(checksum(blank).encode(), blank)

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read what `to_json` wrote.

        Raises
            VerificationFailed: not JSON, not a manifest, or altered since it was written.
        """
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise VerificationFailed(f"{MANIFEST_FILE} is not JSON: {error}.") from error
        _check_version(fields)
        _check_own_checksum(data)
        try:
            return cls(**{name: value for name, value in fields.items() if name != "checksum"})
        except ValidationError as error:
            raise VerificationFailed(
                f"{MANIFEST_FILE} is not a manifest of format {FORMAT_VERSION}.",
                *_located(error),
            ) from error


def _check_version(fields: Any) -> None:
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if not isinstance(version, int):
        raise VerificationFailed(f"{MANIFEST_FILE} has no format_version: not a manifest.")
    if version > FORMAT_VERSION:
        raise VerificationFailed(
            f"{MANIFEST_FILE} is of format {version}; this distmerge reads {FORMAT_VERSION}.",
            fix="pip install --upgrade distmerge",
        )


def _check_own_checksum(data: bytes) -> None:
    found = _OWN_CHECKSUM.search(data)
    if found is None:
        raise VerificationFailed(f"{MANIFEST_FILE} does not end in its own checksum.")
    expected = checksum(_OWN_CHECKSUM.sub(_UNSET.encode(), data))
    if found.group().decode() != expected:
        raise VerificationFailed(f"{MANIFEST_FILE} was changed after it was written.")


def _located(error: ValidationError) -> Iterable[str]:
    for problem in error.errors(include_url=False, include_input=False):
        yield f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
