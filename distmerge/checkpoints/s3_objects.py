"""The boundary between pinned files and S3's own requests, which fsspec's calls don't cover.

Objects are read with `If-Match`, and the ETag of every answer is compared as well, since some
servers ignore the condition. Where the bucket keeps versions, the version is read that was there
when the model was opened, unless the account may not (s3:GetObjectVersion).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from distmerge.checkpoints.retry import HttpStatus, ShortRead
from distmerge.checkpoints.tensors import FileInfo

_PIECE = 2**20
"""Bytes taken from the connection at once."""


class S3Objects:
    """The objects below one path of an S3 filesystem. Thread-safe; each call is one attempt."""

    def __init__(self, fs: Any, base: str) -> None:
        self._fs = fs
        self._base = base.rstrip("/")
        self._may_read_versions = True

    def with_versions(self, files: Mapping[str, FileInfo]) -> Mapping[str, FileInfo]:
        """The files with their version ids, which a listing doesn't tell.

        One request if the bucket keeps no versions, else one for each file.
        """
        return cast(Mapping[str, FileInfo], self._run(self._with_versions, files))

    def fill(self, file: FileInfo, start: int, view: memoryview) -> None:
        """Fill `view` with the object's bytes from `start` on.

        Raises
            HttpStatus: 412, the object is not the one that was pinned.
            Exception: s3fs' own.
        """
        self._run(self._fill, file, start, view)

    def _run(self, action: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        from fsspec.asyn import sync

        return sync(self._fs.loop, action, *arguments)

    async def _with_versions(self, files: Mapping[str, FileInfo]) -> Mapping[str, FileInfo]:
        first, *others = files.values()
        known = await self._with_version(first)
        if known.version is None:
            return files
        every = [known, *await asyncio.gather(*map(self._with_version, others))]
        return {file.path: file for file in every}

    async def _with_version(self, file: FileInfo) -> FileInfo:
        try:
            head = await self._fs._call_s3("head_object", **self._names(file))
        except (PermissionError, FileNotFoundError):
            return file  # its first read will tell
        version = head.get("VersionId") if unquoted(head["ETag"]) == file.tag else None
        return replace(file, version=version)

    async def _fill(self, file: FileInfo, start: int, view: memoryview) -> None:
        answer = await self._ask(file, f"bytes={start}-{start + len(view) - 1}")
        async with answer["Body"] as body:
            if unquoted(answer["ETag"]) != file.tag:
                raise HttpStatus(412, {}, file.path)
            done = 0
            while chunk := await body.read(_PIECE):
                if done + len(chunk) > len(view):
                    raise ShortRead("more bytes came than were asked for")
                view[done : done + len(chunk)] = chunk
                done += len(chunk)
        if done != len(view):
            raise ShortRead(f"{done} bytes came instead of {len(view)}")

    async def _ask(self, file: FileInfo, span: str) -> Any:
        wanted = self._names(file) | {"Range": span, "IfMatch": f'"{file.tag}"'}
        if file.version is not None and self._may_read_versions:
            try:
                return await self._fs._call_s3("get_object", VersionId=file.version, **wanted)
            except PermissionError:
                # It is a permission of its own, and the ETag pins the object as well.
                self._may_read_versions = False
        return await self._fs._call_s3("get_object", **wanted)

    def _names(self, file: FileInfo) -> dict[str, str]:
        bucket, key, _ = self._fs.split_path(f"{self._base}/{file.path}")
        return {"Bucket": bucket, "Key": key}


def unquoted(etag: str) -> str:
    """An ETag without its quotes."""
    return etag.strip('"')
