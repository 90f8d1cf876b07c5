"""The boundary between checkpoints and files on this machine's disks.

Plain reads into the caller's buffer: a memory map would count as this process' memory in a
container. The page cache is left as it is, so a file that several merges share stays warm.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from distmerge.checkpoints.links import is_named_as_a_models, leads_away
from distmerge.checkpoints.parallel import check_range
from distmerge.checkpoints.tensors import FileInfo
from distmerge.errors import (
    AccessDenied,
    CheckpointError,
    CheckpointNotFound,
    DistmergeError,
    ReadFailed,
    SourceChanged,
)

MOST_FILES = 50_000
"""A directory with more than that, folders included, is somebody's disk, not a model."""


class LocalStore:
    """Reads a directory, or one file of it. Links are followed as `links.py` says; hidden files
    are not seen.

    Each read opens the file anew and compares size, time and inode with the pinned ones, before
    and after, so a file that was replaced or written to meanwhile is an error.
    """

    revision: str | None = None

    def __init__(self, root: str, *, only: str | None = None) -> None:
        self.root = root
        self._only = only

    def files(self) -> Mapping[str, FileInfo]:
        """Every file below the root, or the one that this store was opened for."""
        if not os.path.isdir(self.root):
            raise CheckpointNotFound(
                f"There is no directory {self.root!r} on this machine.",
                fix="check the path; workers on other machines must see it too",
            )
        try:
            if self._only is not None:
                info = os.stat(os.path.join(self.root, self._only))
                return {self._only: FileInfo(self._only, info.st_size, tag_of(info))}
            return {
                path: FileInfo(path, info.st_size, tag_of(info))
                for path, info in sorted(walk_files(self.root, leave=self._leads_away))
            }
        except OSError as error:
            raise _explain(error, self.root, self._only or "") from error

    def left_out(self) -> dict[str, str]:
        """What lies in the directory, looks like a part of the model and isn't one of its files:
        path -> what it is."""
        found: dict[str, str] = {}
        if self._only is not None:
            return found
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in (*folders, *names):
                path = os.path.join(folder, name)
                if (kind := self._stray(path)) and not name.startswith("."):
                    found[Path(path).relative_to(self.root).as_posix()] = kind
        return dict(sorted(found.items()))

    def _stray(self, path: str) -> str | None:
        info = _stat(path)
        if info is None:
            return None
        if self._leads_away(path):
            return "a link to another place"
        if stat.S_ISDIR(info.st_mode):
            named = is_named_as_a_models(os.path.basename(path))
            return "a folder" if named else None
        return None if stat.S_ISREG(info.st_mode) else "no regular file"

    def _leads_away(self, path: str) -> bool:
        return leads_away(self.root, path)

    def read_into(self, file: FileInfo, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start` on."""
        view = buffer.cast("B")
        check_range(file, start, len(view))
        path = os.path.join(self.root, file.path)

        def unchanged(info: os.stat_result) -> bool:
            return tag_of(info) == file.tag

        try:
            fill_from_disk(path, start, view, unchanged)
        except DistmergeError:
            raise
        except OSError as error:
            raise _explain(error, self.root, file.path) from error

    def close(self) -> None:
        """Nothing is held between reads."""


def fill_from_disk(
    path: str, start: int, view: memoryview, unchanged: Callable[[os.stat_result], bool]
) -> None:
    """Fill `view` with the bytes of `path` from `start` on.

    Raises SourceChanged if `unchanged` says no to the open file, and OSError as it comes.
    """
    with open(path, "rb", buffering=0) as file:
        _check(file.fileno(), path, unchanged)
        file.seek(start)
        done = 0
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                _check(file.fileno(), path, unchanged)
                raise ReadFailed(f"{path} ended at byte {start + done}, before it should.")
            done += got
        _check(file.fileno(), path, unchanged)


def walk_files(
    root: str,
    *,
    hidden: bool = False,
    follow: bool = True,
    leave: Callable[[str], bool] = lambda path: False,
) -> Iterator[tuple[str, os.stat_result]]:
    """Regular files below `root` by relative path, cycles left out.

    follow: look into linked folders. Linked files are files.
    leave: says of a path that it isn't looked at.
    """
    seen: set[tuple[int, int]] = set()
    count = 0
    for folder, folders, names in os.walk(root, followlinks=follow, onerror=_unless_gone(root)):
        here = _stat(folder)
        count += 1 + len(names)
        if count > MOST_FILES:
            raise CheckpointError(
                f"{root} holds more than {MOST_FILES:,} files, so it is not a model.",
                fix="name the model's own directory",
            )
        if here is None or (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        shown = [name for name in folders if hidden or not name.startswith(".")]
        folders[:] = [name for name in shown if not leave(os.path.join(folder, name))]
        for name in names:
            if not hidden and name.startswith("."):
                continue
            path = os.path.join(folder, name)
            info = _stat(path)
            if info is None or not stat.S_ISREG(info.st_mode) or leave(path):
                continue
            yield Path(path).relative_to(root).as_posix(), info


def tag_of(info: os.stat_result) -> str:
    """What changes when a file is written to or replaced."""
    return f"{info.st_size}-{info.st_mtime_ns}-{info.st_ino}"


def _stat(path: str) -> os.stat_result | None:
    """None for a dangling link, or what was deleted just now: as if it weren't there."""
    return os.stat(path) if os.path.exists(path) else None


def _unless_gone(root: str) -> Callable[[OSError], None]:
    """A folder below the root may go while we look."""

    def told(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | ProcessLookupError) or error.filename == root:
            raise error

    return told


def _check(descriptor: int, path: str, unchanged: Callable[[os.stat_result], bool]) -> None:
    if not unchanged(os.fstat(descriptor)):
        raise SourceChanged(
            f"{path} changed after it was opened.",
            fix="run again once nothing writes to it any more",
        )


def _explain(error: OSError, root: str, file: str) -> DistmergeError:
    path = os.path.join(root, file) if file else root
    if isinstance(error, FileNotFoundError):
        if os.path.isdir(root):
            return SourceChanged(f"{path} is gone: it was there when the model was opened.")
        return CheckpointNotFound(f"There is no directory {root!r} on this machine.")
    if isinstance(error, PermissionError):
        denied = error.filename or path
        return AccessDenied(
            f"You may not read {denied}.", fix=f"chmod +r {denied}, or run as its owner"
        )
    return ReadFailed(f"Could not read {path}.", f"{type(error).__name__}: {error}")
