"""The boundary between one set of storage options and the several places that a merge touches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from distmerge.checkpoints.store import StorageOptions
from distmerge.errors import RecipeError

_SHORTEST = 4
"""Characters of a value that is taken out of texts; a shorter one is a part of many words."""

_LONGEST_WORD = 8


def by_prefix(options: StorageOptions) -> bool:
    """Whether the options are given for URL prefixes: `{"s3://bucket/": {"key": ...}}`."""
    return any("://" in str(name) for name in options)


def options_for(url: str, options: StorageOptions | None) -> Mapping[str, Any]:
    """The fsspec keyword arguments that hold for `url`.

    Options without prefixes hold everywhere. Of several prefixes, the longest that the URL begins
    with counts; where none does, no options hold.
    """
    if not options or not by_prefix(options):
        return options or {}
    fitting = [prefix for prefix in options if _below(url, prefix)]
    return options[max(fitting, key=len)] if fitting else {}


def _below(url: str, prefix: str) -> bool:
    """s3://bucket holds s3://bucket/model, and not s3://bucket-2."""
    return url == prefix or url.startswith(prefix.rstrip("/") + "/")


def check_storage_options(options: StorageOptions) -> None:
    """Refuse what is neither fsspec's keyword arguments nor a mapping of prefixes to them.

    Raises
        RecipeError: its text shows no option's name or value, which may be secret.
    """
    if not isinstance(options, Mapping):
        raise RecipeError(
            f"storage_options are a mapping, not a {type(options).__name__}.",
            fix="storage_options: {'s3://bucket/': {endpoint_url: ...}}, or options alone",
        )
    if not by_prefix(options):
        return
    if not all("://" in name and isinstance(kept, Mapping) for name, kept in options.items()):
        raise RecipeError(
            "storage_options mixes URL prefixes with options.",
            fix="storage_options: {'s3://bucket/': {endpoint_url: ...}}, or options alone",
        )


def secret_values(options: StorageOptions | None) -> tuple[str, ...]:
    """The words among the options' values, and the hosts of addresses among them, longest first:
    libraries quote them in their exceptions."""
    found = {part for word in _words(options or {}) for part in (word, repr(word)[1:-1])}
    found |= {part for word in found for part in _hosts(word)}
    return tuple(sorted((w for w in found if len(w) >= _SHORTEST), key=len, reverse=True))


def quoted(error: BaseException, secrets: Sequence[str]) -> str:
    """What another library's exception says, without values of storage options."""
    text = str(error).strip()
    if not secrets:
        return text
    return re.sub("|".join(map(_apart, secrets)), "***", text, flags=re.IGNORECASE)


def _apart(secret: str) -> str:
    """A pattern. What is an ordinary word, as `path` or `auto` are, isn't looked for in others."""
    is_word = secret.isalpha() and secret.islower() and len(secret) <= _LONGEST_WORD
    return rf"\b{secret}\b" if is_word else re.escape(secret)


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip().rstrip("/")
    elif isinstance(value, Mapping):
        for kept in value.values():
            yield from _words(kept)
    elif isinstance(value, list | tuple):
        for kept in value:
            yield from _words(kept)


def _hosts(word: str) -> Iterator[str]:
    if "://" in word:
        try:
            place = urlsplit(word)
        except ValueError:
            return
        yield from (part for part in (place.netloc, place.hostname, place.password) if part)
