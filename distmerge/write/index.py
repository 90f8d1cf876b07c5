"""The boundary between shards and loaders: what the weight files are called and which holds what.

Loaders know these names by heart: one shard is `model.safetensors` and has no index, several are
numbered and are found through `model.safetensors.index.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def shard_names(count: int) -> list[str]:
    """File names of `count` shards, in order: `model-00001-of-00007.safetensors` and so on."""
    if count < 1:
        raise ValueError(f"a checkpoint has at least one shard, not {count}")
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_json(
    weight_map: Mapping[str, str], total_size: int, metadata: Mapping[str, str]
) -> bytes:
    """The index's bytes, the keys in the order given.

    Args
        weight_map: tensor's key -> file name of its shard.
        total_size: bytes of all tensors, headers not counted.
        metadata: further entries beside `total_size`, which they can't replace.
    """
    index = {
        "metadata": {**metadata, "total_size": total_size},
        "weight_map": dict(weight_map),
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
