"""Pinned reads from an S3 that is not ours: versions, conditions, and accounts that may not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from checkpoints.store_contract import BIG, FILES, HIDDEN, PART, StoreContract, read
from servers.faults import ChangeETag, Rule, Unavailable
from servers.faulty_proxy import FaultyProxy
from servers.s3 import VersioningS3

from distmerge.checkpoints import parallel
from distmerge.checkpoints.opening import open_store
from distmerge.errors import AccessDenied, SourceChanged

MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def server() -> Iterator[VersioningS3]:
    with VersioningS3() as server:
        yield server


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(parallel, "PART", PART)


class Contract(StoreContract):
    bucket: str

    @pytest.fixture
    def place(self, server, tmp_path):
        self.options = server.storage_options
        self.prefix = tmp_path.name
        client = server.client()
        for path, data in (FILES | HIDDEN).items():
            client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}", Body=data)
        return client

    def root(self, place):
        return f"s3://{self.bucket}/{self.prefix}"

    def put(self, place, path, data):
        place.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}", Body=data)

    def delete(self, place, path):
        place.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}")


@pytest.mark.full
class TestUnversionedBucket(Contract):
    """Where a changed object is refused by the server itself."""

    bucket = VersioningS3.bucket


@pytest.mark.full
class TestVersionedBucket(Contract):
    bucket = VersioningS3.versioned
    pins_content = True


class TestVersions:
    """What is asked of a versioned bucket, seen by a proxy on the way."""

    bucket = VersioningS3.versioned

    @pytest.fixture
    def client(self, server, tmp_path) -> Any:
        client = server.client()
        for path, data in FILES.items():
            client.put_object(Bucket=self.bucket, Key=f"{tmp_path.name}/{path}", Body=data)
        return client

    @pytest.fixture
    def proxy(self, server) -> Iterator[FaultyProxy]:
        with FaultyProxy(server.endpoint) as proxy:
            yield proxy

    @pytest.fixture
    def store(self, server, client, proxy, tmp_path) -> Iterator[Any]:
        options = server.storage_options
        options["client_kwargs"]["endpoint_url"] = proxy.url
        store = open_store(f"s3://{self.bucket}/{tmp_path.name}", options)
        yield store
        store.close()

    def test_the_version_that_was_opened_is_read(self, store, client, proxy, tmp_path):
        where = {"Bucket": self.bucket, "Key": f"{tmp_path.name}/{MODEL}"}
        version = client.head_object(**where)["VersionId"]
        file = store.files()[MODEL]
        assert file.version == version
        client.put_object(**where, Body=BIG[::-1])
        proxy.seen.clear()
        assert read(store, file) == BIG
        assert len(proxy.seen) == 4
        assert all(f"versionId={version}" in request.target for request in proxy.seen)

    def test_opening_asks_once_per_file(self, store, proxy):
        store.files()
        assert [r.method for r in proxy.seen].count("HEAD") == len(FILES)

    def test_a_version_that_is_removed_for_good_is_a_change(self, store, client, tmp_path):
        file = store.files()[MODEL]
        where = {"Bucket": self.bucket, "Key": f"{tmp_path.name}/{MODEL}"}
        client.delete_object(**where, VersionId=file.version)
        with pytest.raises(SourceChanged, match=r"model\.safetensors is gone"):
            read(store, file)

    def test_without_the_permission_the_etag_pins(self, store, client, proxy, tmp_path):
        file = store.files()[MODEL]
        proxy.rules.append(Rule(Unavailable(403), "versionId="))
        proxy.seen.clear()
        assert read(store, file, 0, 10) == BIG[:10]
        assert read(store, file, 5, 10) == BIG[5:10]
        assert ["versionId" in r.target for r in proxy.seen] == [True, False, False]
        where = {"Bucket": self.bucket, "Key": f"{tmp_path.name}/{MODEL}"}
        client.put_object(**where, Body=BIG[::-1])
        with pytest.raises(SourceChanged, match=r"model\.safetensors changed"):
            read(store, file)

    def test_an_account_that_may_not_read_at_all_is_told_so(self, store, proxy):
        file = store.files()[MODEL]
        proxy.rules.append(Rule(Unavailable(403), MODEL, "GET"))
        with pytest.raises(AccessDenied):
            read(store, file, 0, 10)

    def test_no_version_is_taken_for_an_object_that_changed_since_it_was_listed(self, store, proxy):
        proxy.rules.append(Rule(ChangeETag(), MODEL, "HEAD"))
        files = store.files()
        assert files[MODEL].version is None
        assert files["weights.bin"].version is not None

    def test_one_question_where_nothing_is_versioned(self, server, client, proxy, tmp_path):
        for path in FILES:
            client.put_object(Bucket=server.bucket, Key=f"{tmp_path.name}/{path}", Body=b"x")
        options = server.storage_options
        options["client_kwargs"]["endpoint_url"] = proxy.url
        files = open_store(f"s3://{server.bucket}/{tmp_path.name}", options).files()
        assert {file.version for file in files.values()} == {None}
        assert [r.method for r in proxy.seen].count("HEAD") == 1
