"""The boundary between a file being written and fsspec's files, which publish when they close.

Here the file gets its own name by `commit` alone. S3 has better: see `s3_upload`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from distmerge.checkpoints.fsspec_store import explain_fsspec
from distmerge.checkpoints.storage_options import quoted
from distmerge.errors import OutputError
from distmerge.write.local_output import temporary_name


class PendingRename:
    """A file under a temporary name, on filesystems that publish as they write."""

    def __init__(self, fs: Any, path: str, place: str, secrets: Sequence[str] = ()) -> None:
        self._fs = fs
        self._secrets = secrets
        self._path = path
        self._temporary = temporary_name(path)
        self._place = place
        self._done = False
        self._doing(self._begin)

    def write(self, data: memoryview) -> None:
        """Append all of `data`."""
        self._doing(lambda: self._file.write(bytes(data.cast("B"))))

    def commit(self) -> None:
        """Finish the file, then give it its name."""
        try:
            self._doing(self._finish)
        except BaseException:
            with suppress(OutputError):
                self.discard()
            raise
        self._done = True

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        if not self._done:
            self._done = True
            self._doing(self._remove)

    def _begin(self) -> None:
        self._fs.makedirs(self._fs._parent(self._path), exist_ok=True)
        self._file = self._fs.open(self._temporary, "wb")

    def _finish(self) -> None:
        self._file.close()
        self._fs.mv(self._temporary, self._path)

    def _remove(self) -> None:
        self._file.close()
        self._fs.invalidate_cache()
        if self._fs.exists(self._temporary):
            self._fs.rm_file(self._temporary)

    def _doing(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            raise _failed(self._place, error, self._secrets) from error


def explain_output(error: Exception, url: str, secrets: Sequence[str] = ()) -> OutputError | None:
    """What a final refusal means to the person who named the output.

    secrets: what is taken out of it where it is quoted.
    """
    known = explain_fsspec(error, url, secrets)
    if known is None:
        return None
    if isinstance(known, FileNotFoundError):
        return OutputError(
            f"{url} can't be written: its bucket or folder doesn't exist.",
            fix="create the bucket, or correct the URL",
        )
    return OutputError(f"You may not write {url}.", *known.facts, fix=known.fix)


def _failed(place: str, error: Exception, secrets: Sequence[str]) -> OutputError:
    return explain_output(error, place, secrets) or OutputError(
        f"Could not write {place}.",
        f"{type(error).__name__}: {quoted(error, secrets)}",
        fix="run the same command again; finished files are kept",
    )
