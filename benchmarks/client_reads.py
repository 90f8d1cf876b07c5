"""Ranged reads of one object on S3 by one client, as distmerge makes them.

Run as a program, in a process of its own: the client (s3fs, obstore), the endpoint, the bucket, the
key, and the object's bytes. It reads all of the object, `PART` bytes a request and `IN_FLIGHT`
requests at once, and prints the bytes, the seconds and those of processor time.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from distmerge.checkpoints.parallel import PartReader
from distmerge.checkpoints.tensors import FileInfo

Fill = Callable[[FileInfo, int, memoryview], None]


def s3fs_reader(endpoint: str, bucket: str, folder: str, name: str) -> tuple[FileInfo, Fill]:
    """The store that merges read with."""
    from distmerge.checkpoints.fsspec_store import FsspecStore

    options = {"client_kwargs": {"endpoint_url": endpoint, "region_name": "us-east-1"}}
    store = FsspecStore(f"s3://{bucket}/{folder}", options)
    return store.files()[name], store.read_into


def obstore_reader(endpoint: str, bucket: str, folder: str, name: str) -> tuple[FileInfo, Fill]:
    """The same requests by obstore, conditions included."""
    obstore: Any = import_module("obstore")
    store = import_module("obstore.store").S3Store(
        bucket,
        endpoint=endpoint,
        region="us-east-1",
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    path = f"{folder}/{name}"
    head = obstore.head(store, path)
    tag = head["e_tag"]

    def read_part(file: FileInfo, start: int, view: memoryview) -> None:
        options = {"range": (start, start + len(view)), "if_match": tag}
        view[:] = memoryview(obstore.get(store, path, options=options).bytes())

    return FileInfo(name, head["size"], tag), PartReader(read_part).fill


READERS = {"s3fs": s3fs_reader, "obstore": obstore_reader}


def main(client: str, endpoint: str, bucket: str, key: str) -> None:
    """Read, and say how long it took."""
    folder, _, name = key.rpartition("/")
    file, fill = READERS[client](endpoint, bucket, folder, name)
    buffer = memoryview(bytearray(file.size))
    fill(file, 0, buffer[: 1 << 20])  # connections are made
    before, begin = os.times(), time.perf_counter()
    fill(file, 0, buffer)
    seconds, after = time.perf_counter() - begin, os.times()
    cpu = after.user + after.system - before.user - before.system
    print(f"{file.size} {seconds:.4f} {cpu:.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
