"""The boundary between a file being written and S3's multipart uploads.

Parts are sent by several requests at once, each repeated while the network fails; a writer who is
faster waits. Nothing is published but by `commit`, and a failure leaves no parts behind.
"""

from __future__ import annotations

import io
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

from distmerge.checkpoints.retry import DEFAULT_POLICY, RetryPolicy, http_status, retrying
from distmerge.errors import OutputError, ReadFailed
from distmerge.write.fsspec_pending import explain_output

PART = 16 * 2**20
"""Bytes of one part, of which S3 takes 10,000."""
IN_FLIGHT = 4
"""Parts that are sent at once."""
HELD = IN_FLIGHT + 2
"""Parts in memory: one being filled, those in flight, and the pieces of them on their way out."""

Answer = TypeVar("Answer")


class _Reader(io.RawIOBase):
    """A part as a file: the network library sends a file in pieces, and copies bytes twice."""

    def __init__(self, part: bytes | bytearray) -> None:
        self._view = memoryview(part)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._view[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


class PendingUpload:
    """A multipart upload that is completed by `commit` alone; one request if it is small."""

    def __init__(
        self,
        fs: Any,
        path: str,
        place: str,
        policy: RetryPolicy = DEFAULT_POLICY,
        secrets: Sequence[str] = (),
    ) -> None:
        self._fs = fs
        bucket, key, _ = fs.split_path(path)
        self._object = {"Bucket": bucket, "Key": key}
        self._place = place
        self._policy = policy
        self._secrets = secrets
        self._done = False
        self._upload: str | None = None
        self._size = 0
        self._tags: dict[int, str] = {}
        self._sending: set[Future[None]] = set()
        self._spare: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self._filling = bytearray(PART)
        self._filled = 0
        self._pool = ThreadPoolExecutor(IN_FLIGHT, "distmerge-upload")

    def write(self, data: memoryview) -> None:
        """Append all of `data`, which may be reused afterwards. Full parts are sent on the way."""
        view = data.cast("B")
        while view:
            taken = min(len(view), len(self._filling) - self._filled)
            self._filling[self._filled : self._filled + taken] = view[:taken]
            self._filled += taken
            view = view[taken:]
            if self._filled == len(self._filling):
                self._send_part()

    def commit(self) -> None:
        """Send the last part and complete the upload."""
        try:
            rest = bytes(memoryview(self._filling)[: self._filled])
            if self._upload is None:
                self._asking(lambda: self._call("put_object", Body=rest))
            else:
                if rest:
                    self._send(rest)
                self._settle(0)
                self._complete(self._upload)
        except BaseException:
            # The first failure is the one to tell; remove_temporaries finds what is left.
            with suppress(OutputError):
                self.discard()
            raise
        self._end()

    def discard(self) -> None:
        """Abort the upload, so that its parts don't linger."""
        if self._done:
            return
        wait(self._sending)  # a part that came after the end would stay
        self._end()
        if self._upload is not None:
            self._asking(lambda: _abort(self._fs, self._object, str(self._upload)))

    def __del__(self) -> None:
        if hasattr(self, "_pool"):
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _end(self) -> None:
        self._done = True
        self._pool.shutdown()
        self._filling = bytearray()
        self._filled = 0

    def _send_part(self) -> None:
        """Hand the full buffer over and go on with another one, once one is free."""
        self._send(self._filling)
        self._settle(IN_FLIGHT)
        try:
            self._filling = self._spare.get_nowait()
        except queue.Empty:
            self._filling = bytearray(PART)
        self._filled = 0

    def _send(self, part: bytes | bytearray) -> None:
        if self._upload is None:
            begun = self._asking(lambda: self._call("create_multipart_upload"))
            self._upload = str(begun["UploadId"])
        number = len(self._tags) + len(self._sending) + 1
        self._size += len(part)
        self._sending.add(self._pool.submit(self._upload_part, number, part))

    def _upload_part(self, number: int, part: bytes | bytearray) -> None:
        answer = self._asking(
            lambda: self._call(
                "upload_part", PartNumber=number, UploadId=self._upload, Body=_Reader(part)
            )
        )
        self._tags[number] = answer["ETag"]
        if isinstance(part, bytearray):
            self._spare.put(part)

    def _settle(self, most: int) -> None:
        """Wait until no more than so many parts are in flight; raises what one of them raised."""
        while self._sending:
            waits = len(self._sending) > most
            done, _ = wait(self._sending, 0 if not waits else None, FIRST_COMPLETED)
            for future in done:
                future.result()
            self._sending -= done
            if not waits:
                return

    def _complete(self, upload: str) -> None:
        parts = [{"PartNumber": n, "ETag": tag} for n, tag in sorted(self._tags.items())]
        again = False

        def complete() -> None:
            nonlocal again
            try:
                self._call(
                    "complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts}
                )
            except Exception as error:
                # The answer to an earlier attempt may have got lost.
                if not (again and http_status(error) == 404 and self._is_there(len(parts))):
                    raise
            finally:
                again = True

        self._asking(complete)

    def _is_there(self, parts: int) -> bool:
        found = self._call("head_object")
        tag = str(found["ETag"]).strip('"')
        return bool(found["ContentLength"] == self._size) and tag.endswith(f"-{parts}")

    def _call(self, method: str, **given: Any) -> Any:
        return self._fs.call_s3(method, **self._object, **given)

    def _asking(self, action: Callable[[], Answer]) -> Answer:
        try:
            return retrying(
                action,
                what=self._place,
                explain=lambda error: explain_output(error, self._place, self._secrets),
                policy=self._policy,
                secrets=self._secrets,
            )
        except ReadFailed as error:
            raise OutputError(
                f"Could not write {self._place}.",
                *error.facts,
                fix="run the same command again; finished files are kept",
            ) from error.__cause__


def abort_uploads(fs: Any, base: str) -> int:
    """Abort every unfinished upload below a path, and say how many they were."""
    bucket, prefix, _ = fs.split_path(base)
    below = f"{prefix.rstrip('/')}/" if prefix else ""
    found = [upload for upload in _uploads(fs, bucket, below) if upload["Key"].startswith(below)]
    for upload in found:
        _abort(fs, {"Bucket": bucket, "Key": upload["Key"]}, upload["UploadId"])
    return len(found)


def _uploads(fs: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    marker: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
        yield from page.get("Uploads", ())
        if not page.get("IsTruncated") or not page.get("NextKeyMarker"):
            return
        marker = {
            "KeyMarker": page["NextKeyMarker"],
            "UploadIdMarker": page.get("NextUploadIdMarker", ""),
        }


def _abort(fs: Any, place: dict[str, str], upload: str) -> None:
    try:
        fs.call_s3("abort_multipart_upload", **place, UploadId=upload)
    except FileNotFoundError:
        return  # gone already
    except Exception as error:
        if http_status(error) != 404:
            raise
