"""The boundary between tests and three servers on loopback that speak S3.

`LoopbackS3` checks signatures. Not there, though the real S3 has it: suffix ranges (`bytes=-8`),
UploadPartCopy, versions, keys that end with a slash. `VersioningS3` keeps versions and honours
conditions by itself, for small objects. `DistantS3` serves a folder from far away.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from socket import socket
from types import TracebackType
from typing import Any, Self

from servers.child import ChildServer, listen
from servers.traffic import SeenRequest

REGION = "us-east-1"


class LoopbackS3:
    """An S3 in a process of its own with one bucket, from `with` to the end of the block."""

    bucket = "models"
    access_key = "loopback-access-key"
    secret_key = "loopback-secret-key"

    def __init__(self) -> None:
        self._listener = listen("127.0.0.1")
        self.endpoint = "http://{}:{}".format(*self._listener.getsockname())
        self._child: ChildServer | None = None

    def __enter__(self) -> Self:
        self._child = self._start(self._listener)
        return self

    def _start(self, listener: socket) -> ChildServer:
        keys = {"NANIO_ACCESS_KEY": self.access_key, "NANIO_SECRET_KEY": self.secret_key}
        return ChildServer("servers.s3_process", [self.bucket], [listener], keys)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._child is not None
        self._child.stop()

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._child is not None
        return self._child.pid

    @property
    def storage_options(self) -> dict[str, Any]:
        """What fsspec's S3 filesystem needs to get in; a fresh dict each time."""
        return {
            "key": self.access_key,
            "secret": self.secret_key,
            "client_kwargs": {"endpoint_url": self.endpoint, "region_name": REGION},
        }

    def url(self, path: str) -> str:
        """`s3://bucket/path`."""
        return f"s3://{self.bucket}/{path}"

    def client(self, *, secret_key: str | None = None, endpoint: str | None = None) -> Any:
        """A botocore client (boto3's, without its transfer manager) that never retries."""
        from botocore.config import Config  # type: ignore[import-untyped]

        config = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
        return self._session.create_client(
            "s3",
            region_name=REGION,
            endpoint_url=endpoint or self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=secret_key or self.secret_key,
            config=config,
        )

    @cached_property
    def _session(self) -> Any:
        import botocore.session  # type: ignore[import-untyped]

        return botocore.session.Session()

    def keys(self, prefix: str = "") -> list[str]:
        """Every key below a prefix, sorted."""
        pages = (
            self.client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=self.bucket, Prefix=prefix)
        )
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", []))

    def unfinished_uploads(self, prefix: str = "") -> list[str]:
        """Keys of multipart uploads that were neither completed nor aborted, sorted."""
        listing = self.client().list_multipart_uploads(Bucket=self.bucket)
        found = [upload["Key"] for upload in listing.get("Uploads", [])]
        return sorted(key for key in found if key.startswith(prefix))

    @property
    def requests(self) -> list[SeenRequest]:
        """Every request so far, oldest first."""
        return self._requests_since(0)

    @contextmanager
    def recording(self) -> Iterator[list[SeenRequest]]:
        """A list that holds the requests made in the block, once the block has ended."""
        assert self._child is not None
        start: int = self._child.call("request_count")
        seen: list[SeenRequest] = []
        try:
            yield seen
        finally:
            seen += self._requests_since(start)

    def _requests_since(self, start: int) -> list[SeenRequest]:
        assert self._child is not None
        found: list[SeenRequest] = self._child.call("requests", start)
        return found


class VersioningS3(LoopbackS3):
    """An S3 that knows versions and conditions, and takes any credentials; no log of requests.

    It keeps objects in memory, several times: they should be small. The second bucket keeps
    versions.
    """

    versioned = "versioned"

    def _start(self, listener: socket) -> ChildServer:
        return ChildServer("servers.s3_versioning_process", [], [listener])

    def __enter__(self) -> Self:
        super().__enter__()
        client = self.client()
        client.create_bucket(Bucket=self.bucket)
        client.create_bucket(Bucket=self.versioned)
        client.put_bucket_versioning(
            Bucket=self.versioned, VersioningConfiguration={"Status": "Enabled"}
        )
        return self


class DistantS3(LoopbackS3):
    """A folder as a bucket, read-only, behind a network that is long, narrow and faulty.

    Its answers are shaped as hadro's options say: latency_ms, latency_jitter_ms, bandwidth_mbps
    (of each response, in megabits), total_bandwidth_mbps, error_rate and fault_seed. No log of
    requests. Not there, though the real S3 has it: conditions.
    """

    def __init__(self, folder: Path, **shaping: float) -> None:
        super().__init__()
        self.bucket = folder.name
        self._settings = {"data": str(folder.parent), **shaping}

    def _start(self, listener: socket) -> ChildServer:
        keys = {"access_key": self.access_key, "secret_key": self.secret_key, "region": REGION}
        settings = json.dumps({**self._settings, **keys})
        return ChildServer("servers.s3_distant_process", [settings], [listener])
