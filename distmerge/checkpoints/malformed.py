"""Between a file's bytes and the format parsers: how they ask for bytes, how they refuse them."""

from __future__ import annotations

import reprlib
from collections.abc import Callable

from distmerge.errors import MalformedCheckpoint

ReadRange = Callable[[int, int], bytes]
"""(start, stop) -> exactly those bytes of one file."""

LARGEST = 2**63 - 1
"""The largest size, offset or element count that torch and file systems can hold."""

MAX_DIMENSIONS = 64
"""Of a tensor; torch's own limit for most operations."""

_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxother = _QUOTE.maxlong = 160


def quoted(value: object) -> str:
    """A value out of a file, fit for a message: escaped, and at most about 160 characters."""
    return _QUOTE.repr(value)


def cut_short(file: str, needed: str, stop: int, size: int) -> MalformedCheckpoint:
    """The error for a file of `size` bytes in which `needed` would end at byte `stop`."""
    return MalformedCheckpoint(
        f"{file} is cut short",
        f"{needed} ends at byte {stop:,}",
        f"the file has {size:,} bytes",
        fix=f"fetch the file again, for instance: hf download ORG/NAME {file} --force-download",
    )


def check_content(first: bytes, file: str) -> None:
    """Refuse what is commonly found under a weight file's name and is no weight file.

    Raises
        MalformedCheckpoint: a Git LFS pointer or a web page.
    """
    if first.startswith(b"version https://git-lfs.github.com/spec/"):
        raise MalformedCheckpoint(
            f"{file} is a Git LFS pointer, not the weights themselves",
            "the repository was cloned without its large files",
            fix="git lfs install && git lfs pull",
        )
    if first[:64].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise MalformedCheckpoint(
            f"{file} is a web page, not a weight file",
            f"it begins with {quoted(first[:40])}",
            fix=f"fetch the file itself, for instance: hf download ORG/NAME {file}",
        )
