"""The boundary between the place that a person named for the output and what writes there."""

from __future__ import annotations

import os
import re

from distmerge.checkpoints.location import HUB_SCHEME, local_path, refuse_credentials
from distmerge.checkpoints.store import OutputStore, StorageOptions
from distmerge.errors import CheckpointError, OutputError
from distmerge.write.local_output import LocalOutput, output_error

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|[a-z0-9]+::")


def open_output(
    url: str | os.PathLike[str],
    storage_options: StorageOptions | None = None,
    *,
    pull_request: bool = False,
) -> OutputStore:
    """Where to write: a local directory, file://, any fsspec URL, hf://. Writes nothing yet.

    pull_request: on the Hub, propose what was written instead of putting it in place.

    Raises OutputError for what can't be written to.
    """
    text = output_name(url)
    if not text.strip():
        raise OutputError("The output needs a name.", fix="give a directory or a URL")
    if text.startswith(HUB_SCHEME):
        from distmerge.write.hub_output import HubOutput

        return HubOutput(text, storage_options, pull_request=pull_request)
    if pull_request:
        raise OutputError(
            "A pull request needs an output on the Hub.",
            f"this one is {text}",
            fix=f"write to {HUB_SCHEME}org/name, or leave --pr out",
        )
    if text.startswith("file://"):
        return _local(local_path(text))
    if not _URL.match(text):
        return _local(os.path.expanduser(text))
    try:
        refuse_credentials(text)
    except CheckpointError as error:
        raise OutputError(error.headline, text, fix=error.fix) from error
    from distmerge.write.fsspec_output import FsspecOutput

    return FsspecOutput(text.rstrip("/") if not text.endswith("://") else text, storage_options)


def output_name(url: str | os.PathLike[str]) -> str:
    """As text. Raises OutputError: it is something else."""
    text = os.fspath(url) if isinstance(url, str | os.PathLike) else url
    if not isinstance(text, str):
        raise OutputError(
            f"An output has a name, and {text!r:.60} is a {type(text).__name__}.",
            fix="give a directory or a URL",
        )
    return text


def _local(path: str) -> LocalOutput:
    """Raises OutputError: no file can be written below a path of this name."""
    try:
        path.encode()
        os.stat(path)
    except UnicodeEncodeError:
        raise OutputError(
            f"The output's name {os.fsencode(path)!r} isn't text.",
            "its name is recorded in UTF-8",
            fix="choose another output",
        ) from None
    except FileNotFoundError:
        if os.path.islink(path):
            raise OutputError(
                f"{path} is a link to a place that isn't there.",
                fix="remove the link, or choose another output",
            ) from None
        if path.startswith("~"):
            raise OutputError(
                f"{path.partition('/')[0]} is no user of this machine.",
                fix=f"./{path}, if that is a folder's name, or choose another output",
            ) from None
        _check_names(path)
    except (OSError, ValueError) as error:
        raise output_error(path, error) from None
    if os.path.realpath(path) == os.path.abspath(os.sep):
        raise OutputError("The output can't be the whole machine.", fix="name a folder of its own")
    return LocalOutput(path)


def _check_names(path: str) -> None:
    """Raises OutputError if a folder that is missing on the way to a path can't have its name,
    which the system says only of one whose own folder is there."""
    names, place = [], os.path.abspath(path)
    while not os.path.exists(place):
        place, name = os.path.split(place)
        names.append(name)
    for name in names:
        try:
            os.stat(os.path.join(place, name))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise output_error(path, error) from None
