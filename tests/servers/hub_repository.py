"""The boundary between the Hub's HTTP API and what it stores: blobs, commits, branches.

Content is kept once, by hash, in one folder. Commits are immutable maps from path to blob.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

LARGE_FILE_PATTERNS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx"),
    *("*.gguf", "*.tflite", "*.ot", "*.npz", "*.npy", "*.zip", "*.tar"),
)
LARGE_FILE_BYTES = 10 << 20
MAIN = "main"


class UnknownRevision(LookupError):
    """The repository has no such branch or commit."""


class UnknownPath(LookupError):
    """The commit has no such file or folder."""


class StaleParent(Exception):
    """The branch moved on since the commit that the client started from."""


@dataclass(frozen=True, slots=True)
class Blob:
    """One file's content, as git and the large file storage name it."""

    size: int
    """Bytes."""
    oid: str
    """git's id: SHA-1 of the content or, for a large file, of its pointer."""
    sha256: str
    file: Path
    """Where the content lies on disk."""
    large: bool
    """Whether it is served by the storage host rather than by the Hub itself."""

    @property
    def etag(self) -> str:
        """What the Hub calls the content in ETag headers, without quotes."""
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True, slots=True)
class Commit:
    """A snapshot of a repository."""

    sha: str
    parent: str | None
    title: str
    files: Mapping[str, Blob]


class BlobStore:
    """A folder of contents named by their SHA-256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where that content is, or will be."""
        return self.folder / sha256

    def holds(self, sha256: str) -> bool:
        """Whether that content was stored already."""
        return self.path(sha256).exists()

    def add(self, name: str, content: bytes) -> Blob:
        """Store a content; `name` decides whether it counts as a large file."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.holds(sha256):
            self.path(sha256).write_bytes(content)
        return self.blob(sha256, large=is_large(name, len(content)))

    def add_file(self, name: str, source: Path) -> Blob:
        """Store a copy of a file; `name` decides whether it counts as a large file."""
        with source.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if not self.holds(sha256):
            shutil.copyfile(source, self.path(sha256))
        return self.blob(sha256, large=is_large(name, source.stat().st_size))

    def adopt(self, sha256: str, file: Path) -> None:
        """Take over a file in this folder that should be the content of that hash.

        Raises
            ValueError: it is another content; the file is removed.
        """
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            file.unlink()
            raise ValueError(f"content of {sha256} hashes to {found}")
        file.replace(self.path(sha256))

    def blob(self, sha256: str, *, large: bool) -> Blob:
        """The record of a stored content.

        Raises
            FileNotFoundError: nothing was stored under that hash.
        """
        file = self.path(sha256)
        size = file.stat().st_size
        content = lfs_pointer(sha256, size) if large else file.read_bytes()
        return Blob(size, git_blob_id(content), sha256, file, large)


@dataclass
class Repository:
    """One model repository: branches that point to commits."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    """`refs/pr/1` and so on, and the commits they point to."""

    def commit_at(self, revision: str) -> Commit:
        """The commit that a branch name, a ref or a full commit id stands for.

        Raises
            UnknownRevision: it stands for nothing here.
        """
        name = MAIN if revision == "HEAD" else revision.removeprefix("refs/heads/")
        sha = self.branches.get(name) or self.pull_requests.get(name, name)
        if sha not in self.commits:
            raise UnknownRevision(revision)
        return self.commits[sha]

    def commit(
        self,
        changes: Mapping[str, Blob | None],
        title: str,
        *,
        branch: str = MAIN,
        parent: str | None = None,
        pull_request: bool = False,
    ) -> Commit:
        """Apply changes (None removes a path) to a branch's head, or propose that.

        Raises
            UnknownRevision: no such branch.
            StaleParent: `parent` is given and is not the branch's head.
        """
        head = self.commits[self.branches[branch]] if branch in self.branches else None
        if head is None and self.commits:
            raise UnknownRevision(branch)
        if parent is not None and (head is None or not head.sha.startswith(parent)):
            raise StaleParent(parent)
        files = dict(head.files) if head else {}
        for path, blob in changes.items():
            if blob is not None:
                files[path] = blob
            else:
                files.pop(path, None)
        commit = _seal(self.id, head, title, files)
        self.commits[commit.sha] = commit
        if pull_request:
            self.pull_requests[f"refs/pr/{len(self.pull_requests) + 1}"] = commit.sha
        else:
            self.branches[branch] = commit.sha
        return commit

    def history(self, revision: str) -> list[Commit]:
        """A revision and its ancestors, newest first."""
        found = [self.commit_at(revision)]
        while (parent := found[-1].parent) is not None:
            found.append(self.commits[parent])
        return found


def is_large(name: str, size: int) -> bool:
    """Whether a file goes to the large file storage: by its name's ending or its size."""
    return size > LARGE_FILE_BYTES or any(
        fnmatch(os.path.basename(name), pattern) for pattern in LARGE_FILE_PATTERNS
    )


def lfs_pointer(sha256: str, size: int) -> bytes:
    """What git itself stores in place of a large file."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return text.encode()


def git_blob_id(content: bytes) -> str:
    """git's object id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _seal(repo_id: str, head: Commit | None, title: str, files: Mapping[str, Blob]) -> Commit:
    parent = head.sha if head else None
    lines = [f"{blob.oid} {path}" for path, blob in sorted(files.items())]
    text = "\n".join([repo_id, parent or "", title, *lines])
    return Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, files)
