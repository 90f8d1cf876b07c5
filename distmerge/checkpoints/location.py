"""The boundary between what a person types and where a model lives.

    ./models/legal             a directory            s3://bucket/legal      any fsspec URL
    legal/model.safetensors    one file               hf://org/name@rev      the Hub
    legal/model.safetensors.index.json                org/name, gpt2@main    the Hub, for short

What exists on disk wins over a Hub id of the same spelling. `base+adapter` is a model with a LoRA
adapter, each named in one of these ways.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from distmerge.credentials import carries_credentials
from distmerge.errors import CheckpointError, CheckpointNotFound

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
HUB_SCHEME = "hf://"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|[a-z0-9]+::")
_SECOND_URL = re.compile(r"(?<=.)\+(?=[A-Za-z][A-Za-z0-9.-]+://)")
_REPO_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_BARE_ID = re.compile(rf"(?P<repo>{_REPO_NAME}(?:/{_REPO_NAME})?)(?:@(?P<revision>.+))?")
_SLASHED_REVISION = re.compile(r"(?P<revision>refs/(?:pr|convert)/[^/]+)(?:/(?P<inside>.*))?")


@dataclass(frozen=True, slots=True)
class Location:
    """One model's place."""

    kind: Literal["local", "url", "hub"]
    root: str
    """Absolute directory path, fsspec URL or hf://org/name[/folder], without a trailing slash."""
    file: str | None = None
    """The one file below the root that was named: weights or an index."""
    revision: str | None = None
    """The Hub revision that was asked for."""
    bare: bool = False
    """Whether it was typed like a Hub id, so that a directory may have been meant."""
    adapter: Location | None = None
    """A LoRA adapter that is applied to it."""


def locate(name: str | os.PathLike[str], *, revision: str | None = None) -> Location:
    """Where `name` is. Looks at the local disk, asks no server.

    Raises
        CheckpointNotFound: it reads like a path, and nothing is there.
        CheckpointError: credentials in a URL, two revisions, a name that means nothing.
    """
    if not isinstance(name, str | os.PathLike):
        raise CheckpointError(
            f"A model has a name, and {name!r:.60} is a {type(name).__name__}.",
            fix="give a directory, a file, a URL or a Hub id",
        )
    text = os.fspath(name)
    if not isinstance(text, str) or not text.strip():
        raise CheckpointError(
            "A model needs a name.", fix="give a directory, a file, a URL or a Hub id"
        )
    base, adapter = split_adapter(text)
    if adapter is not None:
        return replace(locate(base, revision=revision), adapter=locate(adapter))
    if _SCHEME.match(text):
        return _locate_url(text, revision)
    found = _locate_path(text)
    if found is not None:
        return _without_revision(found, text, revision)
    bare = _BARE_ID.fullmatch(text.rstrip("/")) if isinstance(name, str) else None
    if bare is None or _reads_as_file(text):
        raise CheckpointNotFound(
            f"There is no file or directory {text!r}.",
            f"looked in {Path.cwd()}",
            fix=f"check the path; a model on the Hub is spelt org/name or {HUB_SCHEME}org/name",
        )
    chosen = _one_revision(text, bare["revision"], revision)
    return Location("hub", HUB_SCHEME + bare["repo"], revision=chosen, bare=True)


def split_adapter(name: str) -> tuple[str, str | None]:
    """`base+adapter` as its two names; a name that exists on disk, or a URL, is taken whole.

    In a URL a plus sign may be a part of the path, so that there only a second URL, as in
    s3://bucket/base+s3://bucket/adapter, is an adapter.

    Raises CheckpointError for more than one adapter.
    """
    if "+" not in name or os.path.exists(os.path.expanduser(name)):
        return name, None
    found = _SECOND_URL.search(name)
    if found is not None:
        base, adapter = name[: found.start()], name[found.end() :]
    elif _SCHEME.match(name) and not name.startswith(HUB_SCHEME):
        return name, None
    else:
        base, _, adapter = name.partition("+")
    if not base or not adapter or split_adapter(adapter)[1] is not None:
        raise CheckpointError(
            f"{name!r} is not a model with one adapter.",
            fix="write base+adapter, or {model: base, lora: adapter} for paths that hold a '+'",
        )
    return base, adapter


def split_hub_root(root: str) -> tuple[str, str]:
    """The repository id and the folder inside it ("" for none) of hf://org/name[/folder]."""
    parts = root.removeprefix(HUB_SCHEME).split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


def local_path(url: str) -> str:
    """The path that a file:// URL means, percent-encoded or not."""
    path = url.split("://", 1)[1]
    if re.match(r"/[A-Za-z]:", path) and os.name == "nt":
        path = path[1:]
    return path if os.path.exists(path) or "%" not in path else unquote(path)


def is_remote(root: str) -> bool:
    """Do a checkpoint's bytes come over a network, as far as its root tells?"""
    return ("://" in root or "::" in root) and not root.startswith(("file://", "local://"))


def is_safe_path(path: str) -> bool:
    """Whether `path` is relative and stays below what it is joined to, on any system."""
    if re.match(r"[A-Za-z]:", path) or "\\" in path or "\0" in path:
        return False
    return all(part not in ("", ".", "..") for part in path.split("/"))


def is_far(root: str) -> bool:
    """Whether a checkpoint's root is behind a network, as far as its name tells."""
    return ("://" in root or "::" in root) and not root.startswith(("file://", "memory://"))


def refuse_credentials(url: str) -> None:
    """Raise CheckpointError if `url` carries a secret: URLs are recorded in plans and outputs."""
    if carries_credentials(url):
        raise CheckpointError(
            "A URL can't carry credentials, since URLs are recorded with the output.",
            url,
            fix="set them in the environment, or pass storage options",
        )


def _reads_as_file(text: str) -> bool:
    return text.endswith((*WEIGHT_SUFFIXES, *INDEX_SUFFIXES, ".gguf"))


def _locate_path(text: str) -> Location | None:
    path = Path(os.path.expanduser(text))  # a user that isn't there is no error
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise
    except (OSError, ValueError) as error:  # too long, a circle of links, a null character
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            f"{text!r} is no name of a model.", str(reason), fix="name a model's directory"
        ) from None
    if path.is_dir() and os.path.samefile(path, os.path.sep):
        raise CheckpointError(
            f"{text!r} is all of this machine, not a model.", fix="name the model's own directory"
        )
    if path.is_dir():
        return Location("local", os.path.abspath(path))
    if path.is_file():
        full = Path(os.path.abspath(path))
        return Location("local", str(full.parent), file=full.name)
    if os.path.exists(path):
        raise CheckpointError(
            f"{text!r} is neither a directory nor a regular file.", fix="name a model's directory"
        )
    return None


def _locate_url(text: str, revision: str | None) -> Location:
    refuse_credentials(text)
    if text.startswith(HUB_SCHEME):
        return _locate_hub(text, revision)
    if text.startswith("file://"):
        found = _locate_path(local_path(text))
        if found is None:
            raise CheckpointNotFound(
                f"There is no file or directory {local_path(text)!r}.", fix="check the path"
            )
        return _without_revision(found, text, revision)
    url = text.rstrip("/") if not text.endswith("://") else text
    if not text.endswith("/") and _reads_as_file(url):
        root, _, file = url.rpartition("/")
        root += "/" if root.endswith(":/") else ""
        return _without_revision(Location("url", root, file=file), text, revision)
    return _without_revision(Location("url", url), text, revision)


def _locate_hub(text: str, revision: str | None) -> Location:
    body = text.removeprefix(HUB_SCHEME).rstrip("/")
    repo, at, rest = body.partition("@")
    typed: str | None = None
    if at:
        slashed = _SLASHED_REVISION.fullmatch(rest)
        typed, inside = (
            (slashed["revision"], slashed["inside"] or "")
            if slashed
            else (unquote(rest.partition("/")[0]), rest.partition("/")[2])
        )
    else:
        parts = repo.split("/", 2)
        repo, inside = "/".join(parts[:2]), "/".join(parts[2:])
    if not re.fullmatch(rf"{_REPO_NAME}(?:/{_REPO_NAME})?", repo) or (at and not typed):
        raise CheckpointError(
            f"{text!r} is not the address of a model on the Hub.",
            fix=f"write {HUB_SCHEME}org/name or {HUB_SCHEME}org/name@revision",
        )
    if inside and not is_safe_path(inside):
        raise CheckpointError(f"{text!r} names a path outside the repository.")
    file = None
    if inside and _reads_as_file(inside):
        inside, _, file = inside.rpartition("/")
    if inside and "/" not in repo:
        raise CheckpointError(
            f"A folder inside {repo!r} needs the owner's name in front.",
            fix=f"write {HUB_SCHEME}owner/{repo}/{inside}",
        )
    root = f"{HUB_SCHEME}{repo}" + (f"/{inside}" if inside else "")
    return Location("hub", root, file=file, revision=_one_revision(text, typed, revision))


def _one_revision(text: str, typed: str | None, given: str | None) -> str | None:
    if typed and given and typed != given:
        raise CheckpointError(
            f"{text!r} and revision={given!r} name two revisions.", fix="give one of them"
        )
    return typed or given


def _without_revision(location: Location, text: str, revision: str | None) -> Location:
    if revision is not None:
        raise CheckpointError(
            f"{text!r} has no revisions, so revision={revision!r} can't be taken.",
            f"it is {location.root}",
            fix=f"leave the revision out, or write {HUB_SCHEME}org/name@{revision} for the Hub",
        )
    return location
