"""The files that a tokenizer is kept in, where the output's are not the donor's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "chat_template.jinja",
    "chat_template.json",
    "tekken.json",
)
"""What tokenizers are kept in."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What the output has instead of the donor's tokenizer."""

    files: Mapping[str, bytes] = field(repr=False)

    @property
    def replaced(self) -> frozenset[str]:
        """The donor's files that don't come along."""
        return frozenset([*NAMES, *self.files])

    @property
    def digest(self) -> str:
        """Of the content."""
        hasher = hashlib.blake2b(digest_size=16)
        for path in sorted(self.files):
            hasher.update(path.encode() + b"\0" + self.files[path] + b"\0")
        return hasher.hexdigest()
