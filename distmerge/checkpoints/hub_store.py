"""The boundary between checkpoints and the Hugging Face Hub, its CDN and its local cache.

The commit is pinned by one request. Then each file's address is resolved once and its ranges are
read from there; the token goes to the Hub's endpoint only. Files of the pinned commit that the
local cache holds are read from disk. Offline, the cache says what the commit is, too.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from distmerge.checkpoints.http_ranges import RangeClient
from distmerge.checkpoints.hub_account import HubAccount, hub_account
from distmerge.checkpoints.hub_errors import explain_hub
from distmerge.checkpoints.local_store import fill_from_disk, tag_of, walk_files
from distmerge.checkpoints.location import HUB_SCHEME, is_safe_path, split_hub_root
from distmerge.checkpoints.parallel import PartReader, check_range
from distmerge.checkpoints.retry import DEFAULT_POLICY, HttpStatus, RetryPolicy, retrying
from distmerge.checkpoints.store import StorageOptions
from distmerge.checkpoints.tensors import FileInfo
from distmerge.errors import CheckpointNotFound, DistmergeError, MalformedCheckpoint

_COMMIT = re.compile(r"[0-9a-f]{40}")
_API_SECONDS = 30.0


class HubStore:
    """Reads one repository, or one folder of it, at one commit.

    `root` is hf://org/name[/folder]. `revision` is what was asked for until `files()` pins it to
    a commit; a commit is taken as it is, so that a worker needs no request to know the files.
    The endpoint and the token are the environment's (HF_ENDPOINT, HF_TOKEN, `hf auth login`),
    unless storage options for hf:// name others.
    """

    def __init__(
        self,
        root: str,
        revision: str | None = None,
        storage_options: StorageOptions | None = None,
        *,
        only: str | None = None,
        policy: RetryPolicy = DEFAULT_POLICY,
    ) -> None:
        self.root = root
        self.revision = revision
        self._repo, self._folder = split_hub_root(root)
        self._options = storage_options
        self._only = only
        self._policy = policy
        self._client = RangeClient()
        self._parts = PartReader(self._read_part)
        self._addresses: dict[str, str] = {}
        self._locks: dict[str, threading.Lock] = {}

    def files(self) -> Mapping[str, FileInfo]:
        """Every file of the repository's folder at the pinned commit; pins it."""
        if is_offline():
            found = self._cached_files()
        else:
            found = retrying(
                self._listed_files,
                what=f"the file list of {self.root}",
                explain=self._explain,
                policy=self._policy,
                secrets=self._account.secrets,
            )
        prefix = f"{self._folder}/" if self._folder else ""
        below = {
            path.removeprefix(prefix): info
            for path, info in sorted(found.items())
            if path.startswith(prefix)
        }
        kept = {
            path: FileInfo(path, info.size, info.tag)
            for path, info in below.items()
            if self._only in (None, path) and not any(p.startswith(".") for p in path.split("/"))
        }
        if not kept:
            raise CheckpointNotFound(
                f"{HUB_SCHEME}{self._repo} has no {self._only or self._folder or 'files'!r}.",
                f"at commit {self.revision}",
                fix=f"look at what it has: hf models info {self._repo}",
            )
        return kept

    def read_into(self, file: FileInfo, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from the cache or, by concurrent ranges, from the network."""
        if self.revision is None or not _COMMIT.fullmatch(self.revision):
            self.files()
        if not self._filled_from_cache(file, start, buffer.cast("B")):
            self._parts.fill(file, start, buffer)

    def close(self) -> None:
        """End threads and connections."""
        self._parts.close()
        self._client.close()

    @property
    def _account(self) -> HubAccount:
        return hub_account(self.root, self._options)

    def _listed_files(self) -> dict[str, FileInfo]:
        from huggingface_hub import HfApi

        account = self._account
        info = HfApi(endpoint=account.endpoint, token=account.token).model_info(
            self._repo, revision=self.revision, files_metadata=True, timeout=_API_SECONDS
        )
        if info.sha is None or not _COMMIT.fullmatch(info.sha):
            raise MalformedCheckpoint(f"The Hub gave no commit for {self.root}.")
        self.revision = info.sha
        found = {}
        for entry in info.siblings or ():
            if not is_safe_path(entry.rfilename):
                raise MalformedCheckpoint(
                    f"{self.root} lists a file outside itself: {entry.rfilename!r}."
                )
            tag = entry.lfs.sha256 if entry.lfs else entry.blob_id
            found[entry.rfilename] = FileInfo(entry.rfilename, entry.size or 0, str(tag))
        return found

    def _cached_files(self) -> dict[str, FileInfo]:
        """The files of the cached snapshot that the revision means on this machine."""
        repo = Path(cache_folder(), "models--" + self._repo.replace("/", "--"))
        revision = self.revision or "main"
        ref = repo / "refs" / revision
        commit = ref.read_text().strip() if ref.is_file() else revision
        snapshot = repo / "snapshots" / commit
        if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
            raise CheckpointNotFound(
                f"{self._repo!r} at {revision!r} is not in the local Hugging Face cache.",
                f"the Hub is switched off (HF_HUB_OFFLINE), and the cache is {cache_folder()}",
                fix=f"unset HF_HUB_OFFLINE, or fetch it first: hf download {self._repo}",
            )
        self.revision = commit
        return {
            path: FileInfo(path, info.st_size, _blob_name(snapshot / path) or tag_of(info))
            for path, info in walk_files(str(snapshot))
        }

    def _filled_from_cache(self, file: FileInfo, start: int, view: memoryview) -> bool:
        from huggingface_hub import try_to_load_from_cache

        check_range(file, start, len(view))
        path = try_to_load_from_cache(
            self._repo, self._inside(file), cache_dir=cache_folder(), revision=self.revision
        )
        try:
            if not isinstance(path, str) or os.path.getsize(path) != file.size:
                return False
            fill_from_disk(path, start, view, lambda now: now.st_size == file.size)
        except OSError:
            return False  # deleted or unreadable: the network has the same bytes
        return True

    def _inside(self, file: FileInfo) -> str:
        return f"{self._folder}/{file.path}" if self._folder else file.path

    def _read_part(self, file: FileInfo, start: int, view: memoryview) -> None:
        retrying(
            lambda: self._fetch(file, start, view),
            what=f"{self.root}/{file.path}, bytes {start}:{start + len(view)}",
            explain=self._explain,
            policy=self._policy,
            secrets=self._account.secrets,
        )

    def _fetch(self, file: FileInfo, start: int, view: memoryview) -> None:
        address = self._address(file)
        try:
            self._fetch_from(address, file, start, view)
        except HttpStatus as refused:
            if refused.status not in (401, 403) or _same_host(address, self._account.endpoint):
                raise
            # A signed address expires; a second refusal is meant.
            self._fetch_from(self._address(file, unlike=address), file, start, view)

    def _fetch_from(self, address: str, file: FileInfo, start: int, view: memoryview) -> None:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        account = self._account
        at_home = _same_host(address, account.endpoint)
        headers = build_hf_headers(token=account.token) if at_home else {}
        self._client.fill(address, start, view, size=file.size, headers=headers)

    def _address(self, file: FileInfo, *, unlike: str | None = None) -> str:
        """Where the file's bytes are: a signed CDN address, or the endpoint for small files.

        Resolved once per file, and again if all that is known is the address `unlike`.
        """
        from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

        if is_offline():
            raise errors.OfflineModeIsEnabled(f"{file.path} is not in the cache")
        with self._locks.setdefault(file.path, threading.Lock()):
            known = self._addresses.get(file.path, unlike)
            if known is None or known == unlike:
                home, token = self._account.endpoint, self._account.token
                url = hf_hub_url(
                    self._repo, self._inside(file), revision=self.revision, endpoint=home
                )
                found = get_hf_file_metadata(url, token=token, endpoint=home, timeout=_API_SECONDS)
                known = self._addresses[file.path] = found.location
            return known

    def _explain(self, error: Exception) -> DistmergeError | None:
        return explain_hub(error, self._repo, self.revision)


def is_offline() -> bool:
    """Whether the environment forbids asking the Hub."""
    from huggingface_hub import constants

    asked = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return asked or constants.HF_HUB_OFFLINE


def cache_folder() -> str:
    """The local Hugging Face cache, as the environment gives it now."""
    from huggingface_hub import constants

    return os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE


def _blob_name(path: Path) -> str | None:
    """The content hash that the cache stores a file under, which the Hub calls it by, too."""
    target = path.resolve()
    return target.name if target.parent.name == "blobs" else None


def _same_host(url: str, other: str) -> bool:
    mine, theirs = urlsplit(url), urlsplit(other)
    return (mine.scheme, mine.netloc.lower()) == (theirs.scheme, theirs.netloc.lower())
