"""The boundary between an output and a repository of the Hub.

What is written stays apart until `publish`: shards and receipts on a working branch, small files
in memory. Publishing is one commit on the target, made of copies from the working branch. Readers
of the target see the old state or the new one, and nothing between.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distmerge.checkpoints.hub_account import hub_account
from distmerge.checkpoints.location import HUB_SCHEME
from distmerge.checkpoints.retry import DEFAULT_POLICY, RetryPolicy
from distmerge.checkpoints.store import StorageOptions
from distmerge.checkpoints.tensors import FileInfo
from distmerge.errors import OutputError
from distmerge.write.hub_pending import (
    PendingHubFile,
    free_temporary_space,
    sweep_temporary_space,
)
from distmerge.write.hub_repository import MAIN, HubRepository, repository_and_branch
from distmerge.write.local_output import checked_path

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

STAGING = ".distmerge/"
WHOLE = STAGING + "whole/"
"""Folder of the working branch for files of the output itself: apart from what the branch has
from the target."""
LEASE = STAGING + "lease.json"
_TITLE = "distmerge: work in progress"
_GIT = ".gitattributes"


class HubOutput:
    """Writes one branch of one repository, which is made, private, if it isn't there."""

    heartbeat = 120.0
    spools = True
    buffers = 64 << 20
    """What huggingface_hub's own uploads hold."""

    def __init__(
        self,
        url: str,
        storage_options: StorageOptions | None = None,
        *,
        pull_request: bool = False,
        policy: RetryPolicy = DEFAULT_POLICY,
    ) -> None:
        repo, self._target = repository_and_branch(url)
        suffix = "" if self._target == MAIN else f"@{self._target}"
        self.root = f"{HUB_SCHEME}{repo}{suffix}"
        if pull_request and suffix:
            raise OutputError(
                f"A pull request goes to the branch main, not to {self._target}.",
                fix=f"write to {HUB_SCHEME}{repo} with --pr, or leave --pr out",
            )
        self._pull_request = pull_request
        self._hub = HubRepository(repo, hub_account(self.root, storage_options), policy)
        self._suffix = "" if self._target == MAIN else f"-{self._target}"
        self._lease_branch = f"distmerge-lease{self._suffix}"
        self._branch: str | None = None
        self._made: set[str] = set()
        self._gone: set[str] = set()
        self._small: dict[str, bytes] = {}
        self._uploaded: dict[str, CommitOperationAdd] = {}
        self._sizes: dict[str, FileInfo] = {}
        """Of the small and the uploaded ones."""
        self._moved: dict[str, str] = {}
        """New name -> where the file lies on the working branch."""
        self._lock = threading.RLock()

    def begin(self, digest: str) -> None:
        """Work on the branch `distmerge-<digest>`, where an earlier run may have left shards."""
        self._branch = f"distmerge-{digest}{self._suffix}"

    def is_file(self) -> bool:
        """Never: a repository is a folder."""
        return False

    def folders_among(self, paths: Iterable[str]) -> list[str]:
        """None: a file may have the name that others' begin with."""
        return []

    def exists(self, path: str) -> bool:
        """Whether that file is there, whole."""
        if path == LEASE:
            return LEASE in self._hub.files(self._lease_branch)
        return path in self.list(path)

    def list(self, prefix: str = "") -> Mapping[str, FileInfo]:
        """Files as they will be once published, and what belongs to the run; not the lease."""
        with self._lock:
            found = {
                path: info
                for path, info in self._hub.files(self._target).items()
                if path not in self._gone and path != _GIT and not path.startswith(STAGING)
            }
            found |= self._at_work() | self._sizes
        return {path: found[path] for path in sorted(found) if path.startswith(prefix)}

    def read_bytes(self, path: str) -> bytes:
        """All of one small file. Raises FileNotFoundError if it isn't there."""
        if path == LEASE:
            return self._hub.read(self._lease_branch, LEASE)
        with self._lock:
            if path in self._small:
                return self._small[path]
            self._flush()
            if self._branch and (path.startswith(STAGING) or path in self._at_work()):
                return self._hub.read(self._branch, self._place(path))
            if path in self._gone:
                raise FileNotFoundError(f"{self.root}/{path}")
        return self._hub.read(self._target, path)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Create or replace one small file: on a branch if it belongs to the run, else in memory
        until it is published."""
        from huggingface_hub import CommitOperationAdd

        if checked_path(path) == LEASE:
            self._make(self._lease_branch)
            self._hub.commit(self._lease_branch, [CommitOperationAdd(path, data)], _TITLE)
        elif path.startswith(STAGING):
            with self._lock:
                self._flush(CommitOperationAdd(path, data))
        else:
            with self._lock:
                self._forget(path)
                self._small[path] = data
                self._sizes[path] = FileInfo(path, len(data), secrets.token_hex(8))

    def open_write(self, path: str) -> PendingHubFile:
        """Begin a large file, in this machine's temporary space."""
        checked_path(path)
        return PendingHubFile(lambda place, size: self._upload(path, place, size))

    def delete(self, path: str) -> None:
        """Remove one file; a missing one is no error. Readers of the target see it until the
        rest is published."""
        if checked_path(path) == LEASE:
            self._hub.delete_branch(self._lease_branch)
            self._made.discard(self._lease_branch)
            return
        with self._lock:
            self._forget(path)
            self._gone.add(path)
            if self._branch and path in self._at_work():
                self._hub.delete(self._branch, self._place(path), _TITLE)

    def move(self, path: str, to: str) -> None:
        """Give a whole file another name, once it is published."""
        checked_path(to)
        with self._lock:
            self._flush()
            if checked_path(path) not in self._at_work():
                raise OutputError(f"{self.root} has no {path} to move.")
            self._forget(to)
            self._moved[to] = self._place(path)

    def publish(self, title: str, text: str) -> str:
        """All at once: one commit on the target, or a pull request with it. The URL to read."""
        with self._lock:
            self._flush()
            if self._target not in self._hub.branches():
                self._hub.create_branch(self._target, self._hub.first_commit())
            proposed = self._pull_request
            try:
                done = self._hub.commit(
                    self._target, self._operations(), title, text=text, pull_request=proposed
                )
            except OutputError:
                if proposed or self._operations():  # else it was done, and the answer got lost
                    raise
                return self.root
        return f"{HUB_SCHEME}{self._hub.name}@{done.pr_revision}" if proposed else self.root

    def remove_below(self, folder: str) -> None:
        """Remove every file below a folder."""
        if folder != STAGING:
            for path in self.list(folder):
                self.delete(path)
            return
        with self._lock:
            if self._branch:
                self._hub.delete_branch(self._branch)
                self._made.discard(self._branch)
            for path in [path for path in self._sizes if path.startswith(STAGING)]:
                self._forget(path)

    def remove_temporaries(self) -> int:
        """Remove the working branches of other merges to this target, and what dead processes
        left in this machine's temporary space."""
        mine = re.compile(rf"distmerge-[0-9a-f]{{8,}}{re.escape(self._suffix)}")
        branches = [b for b in self._hub.branches() if mine.fullmatch(b) and b != self._branch]
        for branch in branches:
            self._hub.delete_branch(branch)
        return len(branches) + sweep_temporary_space()

    def free_bytes(self) -> int | None:
        """Room for shards that wait to be sent."""
        return free_temporary_space()

    def _operations(self) -> Sequence[Any]:
        """What is left to do, from what the target has to what it is to have."""
        from huggingface_hub import (
            CommitOperationAdd,
            CommitOperationCopy,
            CommitOperationDelete,
        )

        commit = self._hub.head(self._working())
        ours = {p: info.tag for p, info in self._at_work().items() if not p.startswith(STAGING)}
        there = {path: info.tag for path, info in self._hub.files(self._target).items()}
        gone = (there.keys() & self._gone) - ours.keys() - self._small.keys() - {_GIT}
        shards = [path for path, tag in ours.items() if there.get(path) != tag]
        small = [(p, data) for p, data in self._small.items() if there.get(p) not in _tags(data)]
        return [
            *(CommitOperationDelete(path) for path in sorted(gone)),
            *(CommitOperationCopy(self._place(p), p, src_revision=commit) for p in shards),
            *(CommitOperationAdd(path, data) for path, data in small),
        ]

    def _at_work(self) -> dict[str, FileInfo]:
        """What the working branch holds of this run, by the output's paths."""
        if self._branch is None:
            return {}
        names = {place: path for path, place in self._moved.items()}
        found = {}
        for place, info in self._hub.files(self._branch).items():
            if place.startswith(STAGING) and place != LEASE:
                path = names.get(place, place.removeprefix(WHOLE))
                found[path] = FileInfo(path, info.size, info.tag)
        return found

    def _upload(self, path: str, place: str, size: int) -> None:
        """Send a whole file's content. The commit that names it is the next one: its receipt's."""
        from huggingface_hub import CommitOperationAdd

        working = self._working()
        addition = CommitOperationAdd(self._place(path), place)
        self._hub.upload(working, addition)
        with self._lock:
            if addition.path_or_fileobj == place:  # not a large file by the Hub's rules
                addition = CommitOperationAdd(self._place(path), Path(place).read_bytes())
            self._forget(path)
            self._uploaded[path] = addition
            self._sizes[path] = FileInfo(path, size, secrets.token_hex(8))

    def _flush(self, *more: CommitOperationAdd) -> None:
        """Name what was uploaded, and `more`, in one commit on the working branch."""
        additions = [*self._uploaded.values(), *more]
        if not additions:
            return
        self._hub.commit(self._working(), additions, _TITLE)
        for path in self._uploaded:
            self._sizes.pop(path, None)
        self._uploaded.clear()

    def _place(self, path: str) -> str:
        """Where a file of the output lies on the working branch."""
        return self._moved.get(path) or (path if path.startswith(STAGING) else WHOLE + path)

    def _forget(self, path: str) -> None:
        for kept in (self._small, self._uploaded, self._sizes, self._moved):
            kept.pop(path, None)

    def _working(self) -> str:
        assert self._branch is not None, "begin() comes before the first write"
        self._make(self._branch)
        return self._branch

    def _make(self, branch: str) -> None:
        if branch not in self._made:
            self._hub.create()
            self._hub.create_branch(branch)
            self._made.add(branch)


def _tags(data: bytes) -> tuple[str, str]:
    """What the Hub calls a content: git's name for a small file, the hash of a large one."""
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return git, hashlib.sha256(data).hexdigest()
