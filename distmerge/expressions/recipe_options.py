"""Storage options where a recipe doesn't read them: misspelt, or in another place.

A key that nobody reads is published with the recipe, so what may hold secrets is refused there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from distmerge.credentials import names_secret
from distmerge.errors import RecipeError
from distmerge.expressions.recipe_text import Document, at_path
from distmerge.expressions.yaml_lines import KeyPath

KEY = "storage_options"
OPTION_NAMES = frozenset(
    [
        "key",
        "token",
        "anon",
        "username",
        "client_kwargs",
        "config_kwargs",
        "s3_additional_kwargs",
        "endpoint_url",
        "region_name",
        "account_name",
        "connection_string",
        "sas_token",
        "use_ssl",
        "requester_pays",
        "session",
    ]
)
"""What filesystems call their options, besides names that tell of a secret."""
_LIKE = 0.8
"""How much of a misspelling is the key's own letters."""
_FIX = "write it under storage_options: {'s3://bucket/': {...}}, at the top level, or leave it out"


def means_storage_options(name: str) -> bool:
    """Whether a key was meant to be `storage_options`."""
    letters = re.sub("[^a-z]", "", name.lower())
    return difflib.SequenceMatcher(None, letters, KEY.replace("_", "")).ratio() >= _LIKE


def refuse_options(document: Document, path: KeyPath) -> None:
    """Refuse a key without effect, at `path`, that holds storage options.

    Raises
        RecipeError: naming the place, and the right one. No value is shown.
    """
    name = str(path[-1])
    if means_storage_options(name) or _is_option(name, path):
        raise RecipeError(
            f"{name!r} is not read at {document.where(path)}, and would be published with the "
            "recipe.",
            "options of filesystems, which may be secret, have one place",
            fix=_FIX,
        )
    if len(path) == 1 and KEY in document.data:
        return  # an anchor's place: the record is written without it
    inside = next(_secrets(at_path(document.data, path)), None)
    if inside is not None:
        raise RecipeError(
            f"{name!r} is not read at {document.where(path)}, and holds {inside!r}, which would be "
            "published with the recipe.",
            fix=_FIX,
        )


def _is_option(name: str, path: KeyPath) -> bool:
    if path[:-1] == ("models",):  # what a formula calls a model
        return False
    own = path[0] != "tokenizer"  # there, 'token' is rather a misspelt 'tokens'
    return names_secret(name) or (own and name in OPTION_NAMES)


def _secrets(value: Any) -> Iterator[str]:
    """Names of secrets at any depth."""
    if isinstance(value, dict):
        for name, kept in value.items():
            if names_secret(name) or name in ("client_kwargs", "config_kwargs"):
                yield name
            yield from _secrets(kept)
    elif isinstance(value, list):
        for kept in value:
            yield from _secrets(kept)
