"""The boundary between one set of storage options and the several places that a merge touches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distmerge.checkpoints.store import StorageOptions
from distmerge.errors import RecipeError


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
