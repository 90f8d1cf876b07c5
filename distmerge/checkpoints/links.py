"""Which links in a model's folder are a part of the model.

A link that stays in the folder is, and so is one into the blobs of the Hub cache that the folder
is a snapshot of. Of what leads elsewhere a file is read if it, and what the link leads to, is
named as a model's files are: people link weights and tokenizers. Stores that name files by their
content may call it anything. Whatever else is behind a link is somebody's own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from distmerge.checkpoints.location import INDEX_SUFFIXES, WEIGHT_SUFFIXES

_OF_A_MODEL = re.compile(
    r".*(?:{})".format("|".join(map(re.escape, (*WEIGHT_SUFFIXES, *INDEX_SUFFIXES, ".gguf"))))
    + r"|(?:.*_)?config\.json|README\.md|model_index\.json|modules\.json"
    r"|tokenizer\.json|(?:special_tokens_map|added_tokens|vocab|tekken|chat_template)\.json"
    r"|vocab\.txt|merges\.txt|chat_template\.jinja"
    r"|(?:tokenizer|spiece|sentencepiece\.bpe)\.model(?:\.v\d+)?|(?:source|target)\.spm"
    r"|.*\.tiktoken|bpe\.codes|config_sentence_transformers\.json"
    r"|(?:modeling|configuration|tokenization|processing|image_processing)_\w+\.py"
)

_CONTENT_STORE = re.compile(r"/\.git/annex/objects/|/\.dvc/cache/")


def is_named_as_a_models(name: str) -> bool:
    """Is that what weights, a config, a tokenizer or a model's code are called?"""
    return _OF_A_MODEL.fullmatch(name) is not None


def leads_away(root: str, path: str) -> bool:
    """Is `path`, below `root`, a link to something that isn't the model's?"""
    if not os.path.islink(path):
        return False
    target = Path(os.path.realpath(path))
    if any(target.is_relative_to(place) for place in _homes(root)):
        return False
    return target.is_dir() or not _is_followed(os.path.basename(path), target)


def _is_followed(name: str, target: Path) -> bool:
    """Weights by their own name, since they are read as weights and never copied; what would be
    copied by that of its target too: a link called vocab.txt may lead to somebody's key."""
    if name.endswith((*WEIGHT_SUFFIXES, *INDEX_SUFFIXES)):
        return True
    return is_named_as_a_models(name) and (_is_blob(target) or is_named_as_a_models(target.name))


def _is_blob(target: Path) -> bool:
    """Is it in a store that names files by their content: the Hub cache, git-annex, DVC?"""
    if target.parent.name == "blobs":
        return (target.parent.parent / "snapshots").is_dir()
    return _CONTENT_STORE.search(target.as_posix()) is not None


def _homes(root: str) -> list[str]:
    """Where the bytes of a model's folder may lie: there, and in the Hub cache around it."""
    real = Path(os.path.realpath(root))
    caches = [p.parent / "blobs" for p in (real, *real.parents) if p.name == "snapshots"]
    return [str(real), *(os.path.realpath(cache) for cache in caches[:1])]
