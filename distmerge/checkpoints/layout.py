"""Which files of a directory are the model: the boundary between a listing and the weights.

Pure: decides on names and on an index's text, reads nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from distmerge.checkpoints.location import INDEX_SUFFIXES, WEIGHT_SUFFIXES, is_safe_path
from distmerge.checkpoints.tensors import FileInfo
from distmerge.errors import CheckpointError, MalformedCheckpoint

PREFERENCE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
"""The first of these that is there is the model, as for from_pretrained."""

LARGEST_INDEX = 200_000_000
"""Bytes."""

TRAINING_FILE = re.compile(
    r"trainer_state\.json|training_args\..+|events\.out\.tfevents\..+"
    r"|(?:optimizer|scheduler|scaler|rng_state)[\w-]*\.(?:bin|ckpt|npz|pkl|pt|pth|safetensors)",
    re.IGNORECASE,
)
"""The name of a file that a training run goes on from: no weights of a model."""

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Layout:
    """The files that hold the weights, or the index that names them."""

    weights: tuple[str, ...] = ()
    index: str | None = None
    notices: tuple[str, ...] = ()


def choose_layout(files: Mapping[str, FileInfo], place: str) -> Layout:
    """The weights of a directory-like checkpoint, given everything in it.

    Raises CheckpointError if it is not one, saying what was found.
    """
    adapters = [path for path in files if _is_adapter(path)]
    beside = tuple(f"{path} is beside the weights of {place} and not applied." for path in adapters)
    for name in PREFERENCE:
        if name in files and name.endswith(INDEX_SUFFIXES):
            return Layout(index=name, notices=beside)
        if name in files:
            return Layout((name,), notices=beside)
    loose = [path for path in files if _is_loose(path) and path not in adapters]
    safe = [path for path in loose if path.endswith(".safetensors")]
    if loose:
        if safe:  # the other files are, as a rule, the same model once more
            others = [path for path in loose if path not in safe]
            beside += tuple(f"{path} is beside {safe[0]} and not read." for path in others)
        return Layout(tuple(safe or loose), notices=beside)
    if adapters or "adapter_config.json" in files:
        raise CheckpointError(
            f"{place} is an adapter ({(adapters or ['adapter_config.json'])[0]}), not a model.",
            fix="merge it into its base first: peft's merge_and_unload(), then save_pretrained()",
        )
    raise _not_a_checkpoint(files, place)


WHOLE = "fetch or copy the checkpoint again, whole"
"""How to mend what isn't."""


def parse_index(data: bytes, index: str, files: Mapping[str, FileInfo]) -> dict[str, str]:
    """An index's weight map, key -> file, each file being one of `files`.

    Raises MalformedCheckpoint for anything else, hostile paths and missing shards included.
    """
    try:
        weight_map = json.loads(data)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MalformedCheckpoint(
            f"{index} is not an index: it has no JSON object under 'weight_map'.",
            str(error)[:200],
            fix=WHOLE,
        ) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedCheckpoint(
            f"The weight_map of {index} is not an object with entries.", fix=WHOLE
        )
    for key, path in weight_map.items():
        if not isinstance(path, str):
            raise MalformedCheckpoint(
                f"{index} doesn't name a file for every tensor.",
                f"under {key[:200]!r} it has {path!r:.200}",
                fix=WHOLE,
            )
        if not is_safe_path(path):
            raise MalformedCheckpoint(
                f"{index} points outside the checkpoint.",
                f"{key[:200]!r} is in {path!r:.200}",
                fix="take the model from where it was published",
            )
    shards = sorted(set(weight_map.values()))
    missing = [path for path in shards if path not in files]
    if missing:
        raise MalformedCheckpoint(
            f"{len(missing)} of the {len(shards)} files that {index} names "
            f"{'is' if len(missing) == 1 else 'are'} missing.",
            f"missing: {listed(missing)}",
            fix=WHOLE,
        )
    return weight_map


def listed(names: list[str]) -> str:
    """A few of the names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:200] for name in names[:_SHOWN]) + more


def gguf(place: str) -> CheckpointError:
    """The error for llama.cpp's format."""
    return CheckpointError(
        f"{place} is GGUF, llama.cpp's quantised format, and can't be merged.",
        fix="merge the model that it was made from, or from_pretrained(folder, gguf_file=...), "
        "save_pretrained() first",
    )


def _is_loose(path: str) -> bool:
    return "/" not in path and path.endswith(WEIGHT_SUFFIXES) and not TRAINING_FILE.fullmatch(path)


def _is_adapter(path: str) -> bool:
    return path.startswith("adapter_model.") and path.endswith(WEIGHT_SUFFIXES)


def _not_a_checkpoint(files: Mapping[str, FileInfo], place: str) -> CheckpointError:
    weights = [path for path in files if path.endswith((*WEIGHT_SUFFIXES, *INDEX_SUFFIXES))]
    if not weights and any(path.endswith(".gguf") for path in files):
        return gguf(place)
    found = f"found: {listed(list(files)) or 'no files'}"
    if weights:
        return CheckpointError(
            f"{place} is not a checkpoint, although it holds weights in some form.",
            found,
            fix=f"name the file or folder itself, such as {place}/{weights[0]}",
        )
    return CheckpointError(
        f"{place} is not a checkpoint.",
        found,
        "expected: model.safetensors, pytorch_model.bin, or their .index.json with all shards",
        fix="name the directory that save_pretrained() wrote",
    )
