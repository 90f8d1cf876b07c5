"""Between the bytes that head a safetensors file and the tensors they place: both ways.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensors back to back.
Nothing in it is believed before it is checked.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from distmerge.checkpoints.malformed import (
    LARGEST,
    MAX_DIMENSIONS,
    ReadRange,
    check_content,
    cut_short,
    quoted,
)
from distmerge.checkpoints.tensors import DTYPE_BYTES, TensorInfo
from distmerge.errors import MalformedCheckpoint, OutputError

FIRST_READ = 128 * 1024
"""Bytes to ask for at first: the whole header of most files (about 110 bytes a tensor)."""

MAX_HEADER = 100_000_000
"""Bytes; the format's own limit on the JSON."""

ALIGNMENT = 64
"""Bytes; the data of a file that is written here begins at a multiple of it."""

_METADATA = "__metadata__"
_REWRITE = "write the file again with safetensors.torch.save_file(tensors, 'model.safetensors')"


def read_header(
    read: ReadRange, size: int, file: str, first: bytes | None = None
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file in the order of their offsets, and its metadata.

    `size` is the file's, in bytes; `first` is a beginning of the file that was read already.
    One request where the header fits `first` (or FIRST_READ), one more where it doesn't.

    Raises
        MalformedCheckpoint: the header contradicts itself or the file, or the file is cut short.
    """
    if size < 8:
        raise cut_short(file, "the header's length", 8, size)
    if first is None or len(first) < 8:
        first = read(0, min(size, FIRST_READ))
    length = int.from_bytes(first[:8], "little")
    _check_length(length, first, size, file)
    data_start = 8 + length
    if len(first) < data_start:
        first += read(len(first), data_start)
    header = _parse(first[8:data_start], file)
    metadata = _metadata(header.pop(_METADATA, {}), file)
    tensors = {name: _tensor(name, entry, data_start, file) for name, entry in header.items()}
    return _in_order(tensors, data_start, size, file), metadata


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The exact bytes before the data, and each tensor's absolute (start, stop) in the file.

    `tensors` are (name, dtype, shape), laid out back to back in that order; the JSON is padded
    with spaces so that the data begins at a multiple of 64 bytes. Where tensors are given by
    falling element size, each one is aligned to its own element size.

    Raises
        OutputError: a name that the format can't hold, one that comes twice, or a header of more
            than 100 MB.
    """
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    spans: dict[str, tuple[int, int]] = {}
    position = 0
    for name, dtype, shape in tensors:
        if name in spans or name == _METADATA:
            raise OutputError(
                f"safetensors can't hold a tensor named {quoted(name)}",
                "the name is the format's own" if name == _METADATA else "the name comes twice",
                fix="rename the tensor in the input",
            )
        stop = position + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        spans[name] = (position, stop)
        position = stop
    text = _encode(header)
    start = len(text) + 8
    absolute = {name: (start + begin, start + stop) for name, (begin, stop) in spans.items()}
    return len(text).to_bytes(8, "little") + text, absolute


def _encode(header: Mapping[str, object]) -> bytes:
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise OutputError(
            "a tensor's name or the metadata is no valid Unicode",
            str(error),
            fix="rename the tensor in the input",
        ) from error
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise OutputError(
            "a shard's header is larger than safetensors allows",
            f"{len(header):,} entries make {len(text):,} bytes",
            f"the format allows {MAX_HEADER:,} bytes",
            fix="--max-shard-size 1GB spreads the tensors over more files",
        )
    return text


def _check_length(length: int, first: bytes, size: int, file: str) -> None:
    check_content(first, file)
    zipped = first.startswith(b"PK\x03\x04")
    if length > MAX_HEADER or zipped:
        raise MalformedCheckpoint(
            f"{file} is not a safetensors file",
            f"it begins {'like a zip archive' if zipped else f'with {quoted(first[:16])}'}",
            f"its header would have {length:,} bytes; the format allows {MAX_HEADER:,}",
            fix=f"rename it to {file}.bin if torch.save wrote it; otherwise {_REWRITE}",
        )
    if 8 + length > size:
        raise cut_short(file, "the header", 8 + length, size)


def _parse(text: bytes, file: str) -> dict[str, Any]:
    try:
        header = json.loads(
            text.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant
        )
        if b"\\u" in text:
            # Python lets half a surrogate pair through, which nothing could write again.
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise MalformedCheckpoint(
            f"{file}: the header is not valid JSON", str(error), fix=_REWRITE
        ) from error
    if type(header) is not dict:
        raise MalformedCheckpoint(
            f"{file}: the header is not a JSON object",
            f"it is a {type(header).__name__}: {quoted(header)}",
            fix=_REWRITE,
        )
    return header


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | tuple[Any, ...]:
    """A JSON object; what looks like a tensor's entry as (dtype, shape, begin, end).

    As a tuple it takes a fifth of the memory, and the garbage collector has less to walk.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        (name, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{quoted(name)} comes twice")
    shape, offsets = found.get("shape"), found.get("data_offsets")
    if type(shape) is list and type(offsets) is list and len(offsets) == 2:
        return found.get("dtype"), tuple(shape), *offsets
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _metadata(value: object, file: str) -> dict[str, str]:
    if type(value) is not dict or not all(type(text) is str for text in value.values()):
        raise MalformedCheckpoint(
            f"{file}: {_METADATA} must map strings to strings",
            f"it is {quoted(value)}",
            fix="save_file(tensors, path, metadata={'format': 'pt'})",
        )
    return value


def _tensor(name: str, entry: object, data_start: int, file: str) -> TensorInfo:
    if type(entry) is not tuple:
        raise _refusal(
            file,
            name,
            f"its entry is {quoted(entry)}",
            "an entry has a dtype, a list as its shape and two data_offsets",
        )
    dtype, shape, begin, end = entry
    if type(dtype) is not str or dtype not in DTYPE_BYTES:
        raise MalformedCheckpoint(
            f"{file}: {quoted(name)} has a dtype that can't be read: {quoted(dtype)}",
            f"readable: {', '.join(DTYPE_BYTES)}",
            fix="save the model in one of those: model.to(torch.bfloat16).save_pretrained(DIR)",
        )
    _check_shape(name, shape, file)
    if not _is_whole(begin) or not _is_whole(end):
        raise _refusal(file, name, f"its offsets are {quoted([begin, end])}, not whole numbers")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != nbytes:
        raise _refusal(
            file,
            name,
            f"its offsets {begin:,} to {end:,} hold {end - begin:,} bytes",
            f"{dtype} of shape {quoted(list(shape))} takes {nbytes:,} bytes",
        )
    return TensorInfo(dtype, shape, file, data_start + begin, data_start + end)


def _check_shape(name: str, shape: tuple[Any, ...], file: str) -> None:
    if len(shape) > MAX_DIMENSIONS:
        fact = f"it has {len(shape):,} dimensions; torch knows {MAX_DIMENSIONS}"
        raise _refusal(file, name, fact)
    bound = 1
    for extent in shape:
        if not _is_whole(extent):
            raise _refusal(file, name, f"its shape is {quoted(list(shape))}, not of whole numbers")
        # An absurd shape is found out early, before the product grows to millions of digits.
        bound *= extent or 1
        if bound > LARGEST // 8:
            raise _refusal(file, name, f"its shape {quoted(list(shape))} is too large to exist")


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _in_order(
    tensors: Mapping[str, TensorInfo], data_start: int, size: int, file: str
) -> dict[str, TensorInfo]:
    """The tensors by offset, once they are known to cover the data without gap or overlap."""
    names = sorted(tensors, key=lambda name: (tensors[name].start, tensors[name].stop))
    position, previous = data_start, ""
    for name in names:
        info = tensors[name]
        if info.start != position:
            kind = "overlaps" if info.start < position else "leaves a hole after"
            raise _refusal(
                file,
                name,
                f"it {kind} {_called(previous)}",
                f"{_called(previous)} ends at byte {position:,}",
                f"{quoted(name)} begins at byte {info.start:,}",
            )
        position, previous = info.stop, name
    if position > size:
        raise cut_short(file, _called(previous), position, size)
    if position < size:
        raise MalformedCheckpoint(
            f"{file} goes on after its last tensor",
            f"{_called(previous)} ends at byte {position:,}",
            f"the file has {size:,} bytes",
            fix=_REWRITE,
        )
    return {name: tensors[name] for name in names}


def _called(name: str) -> str:
    return quoted(name) if name else "the header"


def _refusal(file: str, name: str, *facts: str) -> MalformedCheckpoint:
    return MalformedCheckpoint(
        f"{file}: the header contradicts itself at {quoted(name)}", *facts, fix=_REWRITE
    )
