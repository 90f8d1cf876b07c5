"""The files that a tokenizer is kept in, where the output's are not the donor's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TEMPLATES = "additional_chat_templates/"
"""Where others by name lie."""
NAMES = (
    "tokenizer.json",
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    TEMPLATE,
    "chat_template.json",
    "tekken.json",
)
"""What tokenizers are kept in."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What the output has instead of the donor's tokenizer."""

    files: Mapping[str, bytes] = field(repr=False)
    dropped: frozenset[str] = frozenset(NAMES)
    """The donor's files that don't fit it."""

    @property
    def replaced(self) -> frozenset[str]:
        """The donor's files that don't come along."""
        return self.dropped.union(self.files)

    @property
    def digest(self) -> str:
        """Of the content."""
        hasher = hashlib.blake2b(digest_size=16)
        for path in sorted(self.files):
            hasher.update(path.encode() + b"\0" + self.files[path] + b"\0")
        return hasher.hexdigest()
