"""The boundary between a store and its bytes on this machine's disk: what one reader fetched is
there for all others.

A spool is a folder. A file of a checkpoint, as it was pinned, has a sparse file there and a list of
the ranges that are in it. A range is locked while it is fetched, written, and only then listed:
threads and processes that want it too wait and find it, and what a killed one left half written is
fetched again.

    make(place, limit=...)              on each machine, before anything is read
    open_store(root, spool=place)       reads through it; straight where there is none, or no room
    remove(place)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import stat
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

from distmerge.checkpoints.file_locks import share, try_alone
from distmerge.checkpoints.parallel import check_range
from distmerge.checkpoints.spooled_file import DATA, LIST, SpooledFile
from distmerge.checkpoints.store import Store
from distmerge.checkpoints.tensors import FileInfo

PREFIX = ".distmerge-spool-"
_ABOUT, _LOCK, _FULL = "about.json", "lock", "full"
_FORMAT = 1
_WEAK = "-weak"


class SpooledStore:
    """A store that is asked for a range once on this machine, as long as the spool has room."""

    def __init__(self, inner: Store, place: str) -> None:
        self.root, self.revision = inner.root, inner.revision
        self._inner = inner
        self._folder = folder_of(place)
        self._limit: int | None = None
        self._files: dict[str, SpooledFile] = {}
        self._opening = threading.Lock()

    def files(self) -> Mapping[str, FileInfo]:
        """As the store says."""
        found = self._inner.files()
        self.revision = self._inner.revision
        return found

    def read_into(self, file: FileInfo, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from the spool; what isn't there is fetched into both."""
        view = buffer.cast("B")
        if self._limit is None:
            self._limit = _limit(self._folder)  # a node that joins gets its spool a little later
        if self._limit is None or not len(view):
            self._inner.read_into(file, start, view)
            return
        check_range(file, start, len(view))

        def fetch(at: int, piece: memoryview) -> None:
            self._inner.read_into(file, at, piece)

        self._file(file).read(start, view, fetch, self._has_room)

    def close(self) -> None:
        """The store's end; the spool stays."""
        self._inner.close()

    def _file(self, file: FileInfo) -> SpooledFile:
        name = spooled_name(self.root, file)
        with self._opening:
            if name not in self._files:
                self._files[name] = SpooledFile(self._folder / name, file.size)
            return self._files[name]

    def _has_room(self, more: int) -> bool:
        assert self._limit is not None
        if used_bytes(self._folder) + more <= self._limit:
            return True
        with suppress(OSError):
            (self._folder / _FULL).touch()
        return False


def spooled_name(root: str, file: FileInfo) -> str:
    """What a file is called in a spool: another version of it has another name."""
    told = "\0".join((root, file.path, str(file.size), file.tag))
    weak = _WEAK if file.tag == str(file.size) else ""
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest() + weak


def folder_of(place: str) -> Path:
    """This machine's folder of a spool: several may see the same disk."""
    return Path(f"{place}-{platform.node()}")


def make(place: str, *, limit: int, wanted: Collection[str] | None = None) -> TextIOWrapper:
    """Make a spool on this machine, or go on with what a killed run left of it.

    limit: bytes that it may hold.
    wanted: names of the files that are of use; others of an earlier run are removed.

    Returns what marks it as used, until it is closed.

    Raises
        OSError: the place can't be written, or belongs to somebody else.
    """
    folder = folder_of(place)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent, but=folder)
    lock = _enter(folder)
    try:
        same = _about(folder).get("boot") == boot_id() is not None
        for path in folder.iterdir():
            name = path.name.removesuffix(DATA).removesuffix(LIST)
            stale = wanted is not None and name not in wanted
            if name != path.name and (not same or stale or name.endswith(_WEAK)):
                path.unlink(missing_ok=True)
        (folder / _FULL).unlink(missing_ok=True)
        about = {"format": _FORMAT, "boot": boot_id(), "limit": limit}
        fresh = folder / f"{_ABOUT}.{os.getpid()}"
        fresh.write_text(json.dumps(about))
        fresh.replace(folder / _ABOUT)
    except BaseException:
        lock.close()
        raise
    return lock


def remove(place: str) -> None:
    """Remove a spool from this machine, if it is there."""
    shutil.rmtree(folder_of(place), ignore_errors=True)


def was_full(place: str) -> bool:
    """Has something been read past the spool, since it had no room?"""
    return (folder_of(place) / _FULL).exists()


def used_bytes(folder: Path) -> int:
    """That the spooled files take on the disk."""
    try:
        with os.scandir(folder) as entries:
            found = [entry.stat() for entry in entries if entry.name.endswith(DATA)]
    except OSError:
        return 0
    return sum(info.st_blocks * 512 for info in found)


def boot_id() -> str | None:
    """Of this run of the operating system: what was written before it began may be lost, though it
    is listed. None if that can't be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _limit(folder: Path) -> int | None:
    """The bytes that a spool may hold; None if there is none that is ours."""
    limit = _about(folder).get("limit") if _is_ours(folder) else None
    return limit if isinstance(limit, int) else None


def _about(folder: Path) -> Mapping[str, object]:
    try:
        found = json.loads((folder / _ABOUT).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("format") == _FORMAT else {}


def _is_ours(folder: Path) -> bool:
    """A folder of that name in a place that everybody writes to may be somebody else's bait."""
    try:
        info = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid()


def _enter(folder: Path) -> TextIOWrapper:
    """Make the folder, and mark it as used."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        if not _is_ours(folder):
            raise PermissionError(f"{folder} belongs to somebody else")
        with suppress(FileNotFoundError):  # removed meanwhile, as one that nobody used
            lock = (folder / _LOCK).open("a")
            share(lock)
            if os.path.samestat(os.fstat(lock.fileno()), (folder / _LOCK).stat()):
                return lock
            lock.close()


def remove_abandoned(parent: Path, *, but: Path | None = None) -> int:
    """Remove spools of this machine in a folder, `but` apart, that no run uses any more; how many
    they were."""
    count = 0
    for folder in parent.glob(f"{PREFIX}*-{platform.node()}"):
        if folder != but and _is_ours(folder):
            with suppress(OSError), (folder / _LOCK).open("r+") as lock:
                if try_alone(lock):
                    shutil.rmtree(folder, ignore_errors=True)
                    count += 1
    return count
