"""The boundary between an output and any filesystem that fsspec knows, S3 first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from distmerge.checkpoints.fsspec_store import is_s3, list_files, open_filesystem
from distmerge.checkpoints.retry import DEFAULT_POLICY, RetryPolicy, retrying
from distmerge.checkpoints.storage_options import secret_values
from distmerge.checkpoints.store import PendingFile, StorageOptions
from distmerge.checkpoints.tensors import FileInfo
from distmerge.credentials import redact
from distmerge.errors import CheckpointError, OutputError, ReadFailed
from distmerge.write.fsspec_pending import PendingRename, explain_output
from distmerge.write.local_output import checked_path, is_temporary
from distmerge.write.s3_upload import HELD, PART, PendingUpload, abort_uploads

LARGEST_COPY = 5 * 2**30
"""Bytes that S3 copies by one request."""

Answer = TypeVar("Answer")


class FsspecOutput:
    """Writes below one directory-like URL."""

    heartbeat = 10.0
    spools = False

    def __init__(
        self,
        root: str,
        storage_options: StorageOptions | None = None,
        *,
        policy: RetryPolicy = DEFAULT_POLICY,
    ) -> None:
        self.root = root
        self._policy = policy
        self._secrets = secret_values(storage_options)
        try:
            self._fs, self._base = open_filesystem(root, storage_options, own_retries=False)
        except CheckpointError as error:
            raise OutputError(error.headline, *error.facts, fix=error.fix) from error
        self._is_s3 = is_s3(self._fs)
        self.buffers = HELD * PART if self._is_s3 else PART

    def begin(self, digest: str) -> None:
        """Nothing to do: merges are told apart by their receipts."""

    def publish(self, title: str, text: str) -> None:
        """Nothing to do: what is written is there."""

    def is_file(self) -> bool:
        """Whether the root is a file instead of a folder."""
        return self._asking(lambda: bool(self._fs.isfile(self._base)))

    def folders_among(self, paths: Iterable[str]) -> list[str]:
        """None: a file may have the name that others' begin with."""
        return []

    def exists(self, path: str) -> bool:
        """Whether that file is there, whole."""

        def look() -> bool:
            self._fs.invalidate_cache()
            return bool(self._fs.exists(self._path(path)))

        return self._asking(look)

    def list(self, prefix: str = "") -> Mapping[str, FileInfo]:
        """Files by path, hidden ones included and temporary ones left out."""
        folder = prefix.rpartition("/")[0]
        base = self._path(folder) if folder else self._base

        def look() -> dict[str, FileInfo]:
            self._fs.invalidate_cache()
            return list_files(self._fs, base)

        found = {}
        for name, info in self._asking(look).items():
            path = f"{folder}/{name}" if folder else name
            if path.startswith(prefix) and not is_temporary(path):
                found[path] = FileInfo(path, info.size, info.tag)
        return found

    def read_bytes(self, path: str) -> bytes:
        """All of one small file. Raises FileNotFoundError if it isn't there."""
        full = self._path(path)

        def read() -> bytes | None:
            try:
                return bytes(self._fs.cat_file(full))
            except FileNotFoundError:
                return None

        data = self._asking(read)
        if data is None:
            raise FileNotFoundError(redact(f"{self.root}/{path}"))
        return data

    def write_bytes(self, path: str, data: bytes) -> None:
        """Atomically create or replace one small file."""
        if self._is_s3:
            full = self._path(path)
            self._asking(lambda: self._fs.pipe_file(full, data))
            return
        pending = self.open_write(path)
        try:
            pending.write(memoryview(data))
        except BaseException:
            pending.discard()
            raise
        pending.commit()

    def open_write(self, path: str) -> PendingFile:
        """Begin a file that nobody sees before `commit`."""
        full = self._path(path)
        place = redact(f"{self.root}/{path}")
        if self._is_s3:
            return PendingUpload(self._fs, full, place, self._policy, self._secrets)
        return PendingRename(self._fs, full, place, self._secrets)

    def delete(self, path: str) -> None:
        """Remove one file; a missing one is no error."""
        full = self._path(path)

        def remove() -> None:
            try:
                self._fs.rm_file(full)
            except FileNotFoundError:
                return

        self._asking(remove)

    def move(self, path: str, to: str) -> None:
        """Give a whole file another name: a copy on the server, then the old name goes."""
        source, target = self._path(path), self._path(to)
        if self._is_s3:
            self._asking(lambda: self._copy_object(source, target))
            self.delete(path)
        else:
            self._asking(lambda: self._fs.mv(source, target))

    def free_bytes(self) -> int | None:
        """Unknown."""
        return None

    def remove_below(self, folder: str) -> None:
        """Remove every file below a folder."""
        for path in self.list(folder):
            self.delete(path)

    def remove_temporaries(self) -> int:
        """Delete what killed runs left behind and say how many things that was.

        On S3 those are unfinished multipart uploads, which cost money. For the holder of the
        output's lease: another run's are not told apart.
        """
        if self._is_s3:
            return self._asking(lambda: abort_uploads(self._fs, self._base))
        found = self._asking(lambda: list_files(self._fs, self._base))
        leftovers = [name for name in found if is_temporary(name)]
        for name in leftovers:
            self.delete(name)
        return len(leftovers)

    def _copy_object(self, source: str, target: str) -> None:
        if self._fs.info(source, refresh=True)["size"] > LARGEST_COPY:
            self._fs.cp_file(source, target)
            return
        bucket, key, _ = self._fs.split_path(source)
        to_bucket, to_key, _ = self._fs.split_path(target)
        copied = {"Bucket": bucket, "Key": key}
        self._fs.call_s3("copy_object", Bucket=to_bucket, Key=to_key, CopySource=copied)

    def _path(self, path: str) -> str:
        return f"{self._base.rstrip('/')}/{checked_path(path)}"

    def _asking(self, action: Callable[[], Answer]) -> Answer:
        """The answer of a small request, repeated while the network fails."""
        try:
            return retrying(
                action,
                what=redact(self.root),
                explain=lambda error: explain_output(error, self.root, self._secrets),
                policy=self._policy,
                secrets=self._secrets,
            )
        except ReadFailed as error:
            raise OutputError(
                f"Could not reach the output {self.root}.", *error.facts, fix=error.fix
            ) from error
