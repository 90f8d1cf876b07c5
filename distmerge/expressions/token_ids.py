"""What a model's config says of its vocabulary: the size, and the ids of special tokens."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

_TOKEN_ID = re.compile(r"_token_(id|ids|index)$")
_LANGUAGE_PARTS = ("text_config", "language_config", "llm_config", "decoder")


def with_vocab_size(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The config of a model with so many rows of embeddings."""
    edited = copy.deepcopy(dict(config))
    told = [part for part in _parts(edited) if "vocab_size" in part]
    for part in told or [edited]:
        part["vocab_size"] = size
    return edited


def with_token_ids(
    config: Mapping[str, Any],
    own: Mapping[str, int],
    origin: Mapping[str, Any],
    tokens: Mapping[str, int],
) -> dict[str, Any]:
    """A config whose special tokens are those of another vocabulary.

    Args
        own: the vocabulary that the config speaks of: token -> id.
        origin: the config of the model that the new vocabulary's ids are those of. What it says
            holds; of what it doesn't say, each token's new id is looked up.
        tokens: the new vocabulary.
    """
    edited = copy.deepcopy(dict(config))
    names = {number: token for token, number in own.items()}
    known = {key: part[key] for part in (*_parts(origin),)[::-1] for key in part if _is_id(key)}
    for part in _parts(edited):
        for key in [key for key in part if _is_id(key)]:
            part[key] = known[key] if key in known else _moved(part[key], names, tokens)
    return edited


def _is_id(key: str) -> bool:
    return _TOKEN_ID.search(key) is not None


def _moved(given: Any, names: Mapping[int, str], tokens: Mapping[str, int]) -> Any:
    """An id, or a list of them, in the new vocabulary; None for a token that it lacks."""
    if isinstance(given, list):
        found = [_moved(one, names, tokens) for one in given]
        return [one for one in found if one is not None]
    if not isinstance(given, int) or isinstance(given, bool) or given < 0:
        return given
    return tokens.get(names.get(given, ""))


def _parts(config: Mapping[str, Any]) -> Iterator[Any]:
    """The config and those of its sections that describe a language model."""
    yield config
    for name in _LANGUAGE_PARTS:
        if isinstance(config.get(name), Mapping):
            yield config[name]
