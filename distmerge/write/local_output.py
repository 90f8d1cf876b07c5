"""The boundary between an output and this machine's disks: temporary name, fsync, rename."""

from __future__ import annotations

import builtins
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from distmerge.checkpoints.local_store import tag_of, walk_files
from distmerge.checkpoints.location import is_safe_path
from distmerge.checkpoints.tensors import FileInfo
from distmerge.errors import OutputError
from distmerge.write.direct_file import BUFFER, DirectFile

DIRECT = sys.platform == "linux"
"""Do large files go past the page cache? Elsewhere there is no common way to ask for it."""
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp$")


class LocalOutput:
    """Writes below one directory, which is made when the first file is.

    Linked folders in it are somebody's own: nothing is listed, written or deleted through one.
    """

    heartbeat = 10.0
    spools = False
    buffers = BUFFER if DIRECT else 0

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.path.abspath(root)
        self._is_new = not os.path.isdir(self.root)

    def begin(self, digest: str) -> None:
        """Nothing to do: merges are told apart by their receipts."""

    def publish(self, title: str, text: str) -> None:
        """Nothing to do: what is written is there."""

    def is_file(self) -> bool:
        """Whether the root is a file instead of a directory."""
        return os.path.isfile(self.root)

    def folders_among(self, paths: Iterable[str]) -> builtins.list[str]:
        """Those of the paths that are folders, so that no file can have the name."""
        return [path for path in paths if os.path.isdir(self._path(path))]

    def exists(self, path: str) -> bool:
        """Whether that file is there, whole."""
        return os.path.isfile(self._path(path))

    def list(self, prefix: str = "") -> Mapping[str, FileInfo]:
        """Files by path, hidden ones included and temporary ones left out."""
        folder = self._path(prefix.rpartition("/")[0])
        if not os.path.isdir(folder):
            return {}
        found = {}
        try:
            for name, info in walk_files(folder, hidden=True, follow=False):
                path = Path(folder, name).relative_to(self.root).as_posix()
                if path.startswith(prefix) and not is_temporary(path):
                    found[path] = FileInfo(path, info.st_size, tag_of(info))
        except OSError as error:
            raise output_error(folder, error) from error
        return dict(sorted(found.items()))

    def read_bytes(self, path: str) -> bytes:
        """All of one small file. Raises FileNotFoundError if it isn't there."""
        full = self._path(path)
        try:
            return Path(full).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise output_error(full, error) from error

    def write_bytes(self, path: str, data: bytes) -> None:
        """Atomically create or replace one small file."""
        pending = PendingLocalFile(self._path(path), direct=False)
        try:
            pending.write(memoryview(data))
        except BaseException:
            pending.discard()
            raise
        pending.commit()

    def open_write(self, path: str) -> PendingLocalFile:
        """Begin a file beside where it will be, under a name of its own."""
        return PendingLocalFile(self._path(path), direct=DIRECT)

    def delete(self, path: str) -> None:
        """Remove one file durably; a missing one is no error."""
        full = self._path(path)
        try:
            os.unlink(full)
            sync_folder(os.path.dirname(full))
        except FileNotFoundError:
            return
        except OSError as error:
            raise output_error(full, error) from error
        self._remove_emptied(os.path.dirname(full))

    def _remove_emptied(self, folder: str) -> None:
        """As on object stores, a folder is there only as long as it holds a file; the root, if it
        wasn't there before."""
        while folder.startswith(self.root) and (self._is_new or folder != self.root):
            try:
                os.rmdir(folder)
            except OSError:  # not empty, or somebody else was faster
                return
            folder = os.path.dirname(folder)

    def move(self, path: str, to: str) -> None:
        """Give a whole file another name, durably."""
        source, target = self._path(path), self._path(to)
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(source, target)
            for folder in {os.path.dirname(source), os.path.dirname(target)}:
                sync_folder(folder)
        except OSError as error:
            raise output_error(target, error) from error

    def free_bytes(self) -> int | None:
        """Room left on the disk that the output is, or will be, on.

        Raises OutputError: it is none, as /proc.
        """
        place = Path(self.root)
        while not place.exists() and place != place.parent:
            place = place.parent
        usage = shutil.disk_usage(place)
        if not usage.total:
            raise OutputError(
                f"{self.root} can't be written to: {place} is on no disk.",
                fix="choose another output",
            )
        return usage.free

    def remove_below(self, folder: str) -> None:
        """Remove every file below a folder."""
        for path in self.list(folder):
            self.delete(path)

    def remove_temporaries(self) -> int:
        """Delete what killed runs left behind and say how many files that was.

        For the holder of the output's lease: another run's temporaries are not told apart.
        """
        if not os.path.isdir(self.root):
            return 0
        found = walk_files(self.root, hidden=True, follow=False)
        leftovers = [name for name, _ in found if is_temporary(name)]
        for name in leftovers:
            self.delete(name)
        return len(leftovers)

    def _path(self, path: str) -> str:
        """Raises OutputError: it would leave the directory."""
        full = self.root
        for name in checked_path(path).split("/") if path else ():
            if full != self.root and os.path.islink(full):
                raise OutputError(
                    f"{full} is a link to another folder.",
                    fix="remove the link, or choose another output",
                )
            full = os.path.join(full, name)
        return full


class PendingLocalFile:
    """A file under a temporary name. Exactly one of `commit` and `discard` ends it."""

    def __init__(self, path: str, *, direct: bool) -> None:
        """direct: past the page cache, as large files are written."""
        self._path = path
        self._temporary = temporary_name(path)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._file = DirectFile(self._temporary) if direct else PlainFile(self._temporary)
        except OSError as error:
            raise output_error(path, error) from error

    def write(self, data: memoryview) -> None:
        """Append all of `data`, which may be reused afterwards."""
        try:
            self._file.write(data.cast("B"))
        except OSError as error:
            raise output_error(self._path, error) from error

    def commit(self) -> None:
        """Make the bytes durable, then the name."""
        try:
            self._file.sync()
            self._file.close()
            os.replace(self._temporary, self._path)
            sync_folder(os.path.dirname(self._path))
        except OSError as error:
            self.discard()
            raise output_error(self._path, error) from error

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        self._file.close()
        Path(self._temporary).unlink(missing_ok=True)


class PlainFile:
    """A new file that is written through the page cache; see `DirectFile` for the other way."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115

    def write(self, data: memoryview) -> None:
        """Append all of `data`, bytes."""
        while data:
            data = data[self._file.write(data) :]

    def sync(self) -> None:
        """Make everything durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Give the descriptor back; a second time does nothing."""
        self._file.close()


def temporary_name(path: str) -> str:
    """A name beside `path` that no other attempt uses."""
    return f"{path}.{secrets.token_hex(8)}.tmp"


def is_temporary(path: str) -> bool:
    """Whether `temporary_name` made that name."""
    return _TEMPORARY.search(path) is not None


def checked_path(path: str) -> str:
    """`path`, or OutputError if it would leave the output's directory."""
    if not is_safe_path(path):
        raise OutputError(f"{path!r} is not a path inside the output.")
    return path


def sync_folder(folder: str) -> None:
    """Make a rename in `folder` survive a power cut, where directories can be synced."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def output_error(place: str, error: OSError | ValueError) -> OutputError:
    """What a failure to write means to the person who named the output."""
    if isinstance(error, ValueError):  # a null character
        return OutputError(f"{place!r} is no name for an output.", str(error), fix="choose another")
    if error.errno in (errno.EACCES, errno.EPERM):
        return OutputError(f"You may not write {place}.", fix="choose a directory that is yours")
    if error.errno == errno.EROFS:
        return OutputError(f"{place} is on a read-only disk.", fix="choose another output")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"No room is left to write {place}.", fix="free some, then run the same command again"
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return OutputError(
            f"{place} can't be written, because a file or directory is in its way.",
            fix="choose another output",
        )
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return OutputError(
            f"{place} is no name for an output.", str(error.strerror), fix="choose another"
        )
    return OutputError(
        f"Could not write {place}.",
        f"{type(error).__name__}: {error}",
        fix="look at the disk, then run the same command again, or choose another output",
    )
