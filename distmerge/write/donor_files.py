"""The boundary between the donor's folder and the output: which of its files come along.

A model is more than its tensors. Tokenizers, chat templates, processors, remote code, pooling
settings: losing one changes the model without a word, so everything is copied unless there is a
reason not to, and every reason can be listed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

import xxhash

from distmerge.checkpoints.layout import TRAINING_FILE
from distmerge.checkpoints.location import is_safe_path
from distmerge.checkpoints.store import OutputStore, Store
from distmerge.checkpoints.tensors import Checkpoint, FileInfo
from distmerge.write.manifest import EVENTS_FILE, MANIFEST_FILE, checksum, checksum_text

PIECE_BYTES = 8 << 20
"""Bytes held at a time while a file is copied."""

LARGEST_COPIED = 1 << 30
"""Bytes above which a file of unknown kind is taken for weights in a format of its own."""

_WEIGHT_FORMATS = "|".join(
    (
        "safetensors|bin|pt|pth|ptl|pte|torchscript|ckpt|distcp|nemo|pkl|pickle",
        "h5|hdf5|keras|pb|tflite|msgpack|npz|ot",
        "onnx|ort|gguf|ggml|ggjt|llamafile|mlmodel|caffemodel|weights",
        "params|pdparams|pdiparams|pdopt|pdmodel|engine|trt|plan|rknn|mnn|dlc",
    )
)

_WEIGHTS = re.compile(
    # A weight format at the end of the name, or in front of what downloads, splitters and
    # external-data writers append to it: model.onnx.data, model.gguf.part1of2.
    rf"\.(?:{_WEIGHT_FORMATS})(?:[._-](?:data|part|split|tmp|incomplete|lock)[\w.-]*)?$"
    r"|\.onnx[._-]data[\w.-]*$"
    r"|\.data-\d+-of-\d+$|ckpt.*\.(?:index|meta)$|(?:^|/)variables\.index$",
    re.IGNORECASE,
)
_INDEX = re.compile(r"\.index(?:\.[\w-]+)?\.json$", re.IGNORECASE)
_PACKAGE = re.compile(r"\.(?:mlpackage|mlmodelc)$", re.IGNORECASE)
_TRAINING_FOLDER = re.compile(r"(?:checkpoint-|global_step)\d+$", re.IGNORECASE)
_README = re.compile(r"readme(?:\.(?:md|markdown|rst|txt))?", re.IGNORECASE)
_PRIVATE_FOLDERS = {".cache", ".huggingface", ".ipynb_checkpoints", "__pycache__"}
_REPLACED = {"config.json", MANIFEST_FILE, EVENTS_FILE}
_STALE = {"mergekit_config.yml", "mergekit_config.yaml", "mergekit_moe_config.yml"}


def files_to_copy(files: Mapping[str, FileInfo]) -> list[FileInfo]:
    """The donor's files that the output takes over unchanged, sorted by path.

    Everything but weights in any format and their indexes, training state, the README, git's
    own files and what distmerge writes itself (config.json among it).
    """
    skipped = skipped_files(files)
    return [files[path] for path in sorted(files) if path not in skipped]


def skipped_files(files: Mapping[str, FileInfo]) -> dict[str, str]:
    """The donor's files that stay behind: path -> why, sorted by path."""
    reasons = {path: _reason(files[path], files) for path in sorted(files)}
    return {path: reason for path, reason in reasons.items() if reason is not None}


def is_weights(path: str) -> bool:
    """Whether a file of this name holds weights, in whatever format, or is an index of them."""
    return bool(_WEIGHTS.search(path) or _INDEX.search(path))


def copy_donor_files(
    donor: Checkpoint, store: Store, output: OutputStore, replaced: Collection[str] = ()
) -> dict[str, str]:
    """Copy the donor's other files to the output, `PIECE_BYTES` in memory at a time.

    replaced: paths of files of which the output has its own, or that don't fit it.

    Returns
        path -> checksum of what was written, as the manifest lists it, in path order.

    Raises
        ReadFailed, SourceChanged: from the donor's store.
        OutputError: from the output's.
    """
    without = {info.file for info in donor.tensors.values()}.union(replaced)
    wanted = [info for info in files_to_copy(donor.files) if info.path not in without]
    return {info.path: _copy(info, store, output) for info in wanted}


def _copy(info: FileInfo, store: Store, output: OutputStore) -> str:
    if info.size > PIECE_BYTES:
        return _copy_in_pieces(info, store, output)
    content = bytearray(info.size)
    store.read_into(info, 0, memoryview(content))
    output.write_bytes(info.path, bytes(content))
    return checksum(content)


def _copy_in_pieces(info: FileInfo, store: Store, output: OutputStore) -> str:
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(PIECE_BYTES))
    pending = output.open_write(info.path)
    try:
        for start in range(0, info.size, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, info.size - start)]
            store.read_into(info, start, piece)
            hasher.update(piece)
            pending.write(piece)
        pending.commit()
    except BaseException:
        pending.discard()
        raise
    return checksum_text(hasher)


def _reason(info: FileInfo, files: Mapping[str, FileInfo]) -> str | None:
    *folders, name = PurePosixPath(info.path).parts
    if not is_safe_path(info.path):
        return "its path leaves the folder"
    if any(part.lower().startswith(".git") for part in (*folders, name)):
        return "git's own"
    if any(part in _PRIVATE_FOLDERS or part == ".distmerge" for part in (*folders, name)):
        return "a cache"
    if _is_training_state(folders, name):
        return "training state"
    if is_weights(info.path) or any(_PACKAGE.search(part) for part in folders):
        return "weights or their index"
    if _is_openvino_graph(info.path, files):
        return "weights or their index"
    if name == "adapter_config.json":
        # Loaders that find one go and fetch the adapter's own base model instead.
        return "describes an adapter whose weights are not copied"
    if not folders and (reason := _reason_at_root(name)):
        return reason
    if info.size > LARGEST_COPIED:
        return f"{info.size / 2**30:.1f} GiB: too large for a file beside the weights"
    return None


def _reason_at_root(name: str) -> str | None:
    if name in _REPLACED:
        return "written anew for the merge"
    if name in _STALE:
        return "describes an earlier merge"
    if _README.fullmatch(name):
        return "describes the donor; the merge gets its own"
    return None


def _is_training_state(folders: list[str], name: str) -> bool:
    in_training = any(_TRAINING_FOLDER.fullmatch(folder) for folder in folders)
    return in_training or bool(TRAINING_FILE.fullmatch(name))


def _is_openvino_graph(path: str, files: Mapping[str, FileInfo]) -> bool:
    """OpenVINO keeps a graph in NAME.xml and its weights in NAME.bin."""
    stem, _, suffix = path.rpartition(".")
    if suffix.lower() != "xml":
        return False
    return f"{stem}.bin" in files or PurePosixPath(path).name.startswith("openvino")
