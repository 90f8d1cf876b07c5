"""Tokenizers by their files: which tokens they have, and one that has those of several."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmerge.errors import RecipeError

Files = Mapping[str, bytes]
"""A tokenizer's files by name."""


@dataclass(frozen=True)
class Tokens:
    """A model's tokenizer."""

    name: str
    """The model's, for messages."""
    files: Files
    ids: Mapping[str, int]
    """Every token's id, the added ones' too, in the order of ids."""
    template: str | None
    loaded: Any
    """transformers' tokenizer."""


def read_tokenizer(name: str, files: Files) -> Tokens:
    """Load a model's tokenizer from its files; no code of the model's is run.

    Raises
        RecipeError: there is none, or transformers can't load it.
    """
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        for path, content in files.items():
            Path(folder, path).write_bytes(content)
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            ids = dict(sorted(loaded.get_vocab().items(), key=lambda item: item[1]))
        except Exception as error:  # what odd files make of the loader is anything
            raise RecipeError(
                f"The tokenizer of {name} can't be loaded.",
                f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
                fix="leave 'tokenizer:' out, or name a model whose files AutoTokenizer loads",
            ) from error
    template = getattr(loaded, "chat_template", None)
    return Tokens(name, files, ids, template if isinstance(template, str) else None, loaded)


def with_tokens(base: Tokens, others: Sequence[Tokens], tokens: Sequence[str]) -> Tokens:
    """The base's tokenizer with tokens added that it lacks, which keeps every id of it.

    others: whose settings (special, stripped, ...) the added tokens have, the first's first.
    """
    missing = [token for token in tokens if token not in base.ids]
    if not missing:
        return base
    added = {
        token.content: token
        for one in reversed(others)
        for token in one.loaded.added_tokens_decoder.values()
    }
    extended = read_tokenizer(base.name, base.files).loaded  # a copy: the base's stays as it is
    extended.add_tokens([added.get(token, token) for token in missing])  # one by one takes minutes
    with tempfile.TemporaryDirectory() as folder:
        extended.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    return read_tokenizer(base.name, {**_beside(base.files), **files})


def _beside(files: Files) -> dict[str, bytes]:
    """What loading needs besides the tokenizer's own."""
    return {name: content for name, content in files.items() if name == "config.json"}
