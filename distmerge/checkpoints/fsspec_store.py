"""The boundary between checkpoints and any filesystem that fsspec knows, S3 first.

S3 pins what it reads (`s3_objects.py`). Other filesystems offer no such thing: there the file is
looked at again after each read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast
from zipfile import BadZipFile

from distmerge.checkpoints.location import is_safe_path
from distmerge.checkpoints.parallel import PartReader
from distmerge.checkpoints.retry import (
    DEFAULT_POLICY,
    RetryPolicy,
    ShortRead,
    http_status,
    is_unreachable,
    retrying,
)
from distmerge.checkpoints.s3_objects import S3Objects, unquoted
from distmerge.checkpoints.storage_options import options_for, quoted, secret_values
from distmerge.checkpoints.store import StorageOptions
from distmerge.checkpoints.tensors import FileInfo
from distmerge.credentials import redact
from distmerge.errors import (
    AccessDenied,
    CheckpointError,
    CheckpointNotFound,
    DistmergeError,
    MalformedCheckpoint,
    SourceChanged,
)

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), or pass storage options "
    "such as key and secret, or anon: true for a public bucket"
)
CONNECTIONS = 64
"""To one S3 account at once, over all the stores of this process."""

_S3_FILESYSTEMS: dict[str, Any] = {}
_S3_LOCK = threading.Lock()
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"})


class FsspecStore:
    """Reads one directory-like URL, or one file of it."""

    revision: str | None = None

    def __init__(
        self,
        root: str,
        storage_options: StorageOptions | None = None,
        *,
        only: str | None = None,
        policy: RetryPolicy = DEFAULT_POLICY,
    ) -> None:
        self.root = root
        self._fs, self._base = open_filesystem(root, storage_options, own_retries=False)
        self._s3 = S3Objects(self._fs, self._base) if is_s3(self._fs) else None
        self._only = only
        self._policy = policy
        self._secrets = secret_values(storage_options)
        self._parts = PartReader(self._read_part)

    def files(self) -> Mapping[str, FileInfo]:
        """Every visible file below the root, or the one that this store was opened for."""
        found = retrying(
            self._listed_files,
            what=f"the file list of {redact(self.root)}",
            explain=lambda error: explain_fsspec(error, self.root, self._secrets),
            policy=self._policy,
            secrets=self._secrets,
        )
        if not found:
            raise CheckpointNotFound(f"Nothing is at {self.root}.", fix="check the URL")
        return found

    def read_into(self, file: FileInfo, start: int, buffer: memoryview) -> None:
        """Fill `buffer` by concurrent ranges of the pinned object."""
        self._parts.fill(file, start, buffer)
        if self._s3 is None and self._tag_now(file) != file.tag:
            raise _changed(self.root, file)

    def close(self) -> None:
        """End the threads; connections end with the filesystem object."""
        self._parts.close()

    def _path(self, path: str) -> str:
        return f"{self._base.rstrip('/')}/{path}"

    def _listed_files(self) -> Mapping[str, FileInfo]:
        self._fs.invalidate_cache()
        if self._only is not None:
            info = self._fs.info(self._path(self._only))
            found = {self._only: file_info(self._only, info)}
        else:
            found = {
                path: info
                for path, info in list_files(self._fs, self._base).items()
                if not any(part.startswith(".") for part in path.split("/"))
            }
        return self._s3.with_versions(found) if self._s3 is not None and found else found

    def _read_part(self, file: FileInfo, start: int, view: memoryview) -> None:
        read = self._cat_range if self._s3 is None else self._s3.fill
        retrying(
            lambda: read(file, start, view),
            what=f"{redact(self.root)}/{file.path}, bytes {start}:{start + len(view)}",
            explain=lambda error: _explain_read(error, self.root, file, self._secrets),
            policy=self._policy,
            secrets=self._secrets,
        )

    def _cat_range(self, file: FileInfo, start: int, view: memoryview) -> None:
        # By keyword: some filesystems put another parameter between path and start.
        data = self._fs.cat_file(self._path(file.path), start=start, end=start + len(view))
        if len(data) != len(view):
            if self._tag_now(file) != file.tag:
                raise _changed(self.root, file)
            raise ShortRead(f"{len(data)} bytes came instead of {len(view)}")
        view[:] = data

    def _tag_now(self, file: FileInfo) -> str:
        path = self._path(file.path)

        def look() -> str:
            self._fs.invalidate_cache(path)
            return tag_of(self._fs.info(path))

        return retrying(
            look,
            what=f"the state of {redact(self.root)}/{file.path}",
            explain=lambda error: _explain_read(error, self.root, file, self._secrets),
            policy=self._policy,
            secrets=self._secrets,
        )


def open_filesystem(
    url: str, storage_options: StorageOptions | None, *, own_retries: bool
) -> tuple[Any, str]:
    """The filesystem of a URL and the URL's path in it. No request is made.

    Of storage options that are given for URL prefixes, those that hold for `url` are taken.
    With `own_retries=False` an S3 filesystem fails at the first fault, for callers that retry.
    """
    options = dict(options_for(url.rstrip("/") + "/", storage_options))
    try:
        if url.startswith(("s3://", "s3a://")):
            fs = _shared_s3(options, own_retries)
            return fs, str(fs._strip_protocol(url))
        from fsspec.core import url_to_fs

        # An instance of its own: no listing of this process' other users is believed.
        return cast(tuple[Any, str], url_to_fs(url, skip_instance_cache=True, **options))
    except ImportError as error:
        raise CheckpointError(
            f"Reading {url} needs a package that is not installed.",
            quoted(error, secret_values(options)),
            fix="install it; gs:// comes with 'distmerge[gcs]', abfs:// with 'distmerge[azure]'",
        ) from error
    except (ValueError, TypeError, OSError, BadZipFile) as error:
        raise CheckpointError(
            f"{url} can't be opened.",
            quoted(error, secret_values(options)),
            fix="check the URL's scheme, and that an archive in it is one",
        ) from error


def _shared_s3(options: dict[str, Any], own_retries: bool) -> Any:
    """One S3 filesystem per process, options and environment: a session takes half a second."""
    from fsspec.utils import tokenize
    from s3fs import S3FileSystem

    account = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
    key = tokenize(os.getpid(), options, account, own_retries)
    with _S3_LOCK:
        if key not in _S3_FILESYSTEMS:
            config: dict[str, Any] = {"max_pool_connections": CONNECTIONS}
            if not own_retries:
                config["retries"] = {"max_attempts": 0}
            config |= options.get("config_kwargs", {})
            fs = S3FileSystem(**options | {"config_kwargs": config}, skip_instance_cache=True)
            if not own_retries:
                fs.retries = 1
            _S3_FILESYSTEMS[key] = fs
        return _S3_FILESYSTEMS[key]


def is_s3(fs: Any) -> bool:
    """Whether `fs` speaks S3's own requests."""
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return "s3" in protocols and hasattr(fs, "call_s3")


def list_files(fs: Any, base: str) -> dict[str, FileInfo]:
    """Every file below `base`, by its path relative to it, sorted."""
    prefix = base.rstrip("/") + "/"
    found = {}
    for name, info in sorted(fs.find(base, detail=True).items()):
        path = name[len(prefix) :] if name.startswith(prefix) else ""
        if info["type"] != "file" or name.endswith("/") or not path:
            continue
        if not is_safe_path(path):
            raise MalformedCheckpoint(f"{base} holds a file with an unsafe name: {path!r}.")
        found[path] = file_info(path, info)
    return found


def file_info(path: str, info: Mapping[str, Any]) -> FileInfo:
    """fsspec's description of a file in our words."""
    if info["type"] != "file":
        raise FileNotFoundError(f"{path} is a directory")
    if info["size"] is None:
        raise CheckpointError(
            f"The server doesn't say how long {path} is, so it can't be read by ranges.",
            fix="download it, and name the local file",
        )
    return FileInfo(path, info["size"], tag_of(info))


def tag_of(info: Mapping[str, Any]) -> str:
    """What changes when a file is replaced: its ETag, else its size and times."""
    for name in ("ETag", "etag"):
        if info.get(name):
            return unquoted(str(info[name]))
    for name in ("mtime", "LastModified", "last_modified", "updated", "modified", "created"):
        when = info.get(name)
        if when is not None:
            stamp = when.timestamp() if isinstance(when, datetime) else when
            return f"{info['size']}-{stamp}"
    return str(info["size"])


def explain_fsspec(
    error: Exception, url: str, secrets: Sequence[str] = ()
) -> DistmergeError | None:
    """What a final refusal means; None for what may be asked again.

    secrets: what is taken out of it where it is quoted.
    """
    status = http_status(error)
    if type(error).__name__ in _NO_CREDENTIALS:
        return AccessDenied(f"There are no credentials for {url}.", fix=_CREDENTIALS)
    if isinstance(error, PermissionError) or status in (401, 403):
        return AccessDenied(
            f"{url} refuses these credentials.",
            f"the server says: {quoted(error, secrets)}",
            fix=_CREDENTIALS if url.startswith("s3") else "check the storage options",
        )
    if is_unreachable(error):  # which fsspec, over HTTP, calls a file that isn't there
        return None
    if isinstance(error, FileNotFoundError) or status == 404:
        return CheckpointNotFound(f"Nothing is at {url}.", fix="check the URL")
    return None


def _explain_read(
    error: Exception, root: str, file: FileInfo, secrets: Sequence[str]
) -> DistmergeError | None:
    if http_status(error) == 412:
        return _changed(root, file)
    if is_unreachable(error):
        return None
    if isinstance(error, FileNotFoundError) or http_status(error) in (404, 416):
        return SourceChanged(
            f"{root}/{file.path} is gone or shorter than when the model was opened."
        )
    return explain_fsspec(error, f"{root}/{file.path}", secrets)


def _changed(root: str, file: FileInfo) -> SourceChanged:
    return SourceChanged(
        f"{root}/{file.path} changed after it was opened.",
        f"pinned as {file.tag}",
        fix="run again once nothing writes to it any more",
    )
