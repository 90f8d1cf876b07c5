"""What every store promises, asked of each of them, and what only one of them has to stand."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from checkpoints.store_contract import BIG, FILES, HIDDEN, PART, QUICK, StoreContract, read
from servers import faulty_proxy as faults
from servers.faulty_proxy import FaultyProxy, Rule

from distmerge.checkpoints import parallel
from distmerge.checkpoints.fsspec_store import FsspecStore
from distmerge.checkpoints.hub_store import HubStore
from distmerge.checkpoints.opening import open_store
from distmerge.errors import (
    AccessDenied,
    CheckpointNotFound,
    ReadFailed,
    SourceChanged,
)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(parallel, "PART", PART)


class TestLocalStore(StoreContract):
    @pytest.fixture
    def place(self, tmp_path):
        root = tmp_path / "a model"
        for path, data in (FILES | HIDDEN).items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        return root

    def root(self, place):
        return str(place)

    def put(self, place, path, data):
        (place / path).write_bytes(data)

    def delete(self, place, path):
        (place / path).unlink()

    def test_links_are_followed_but_not_in_circles(self, place, tmp_path):
        blob = tmp_path / "blob"
        blob.write_bytes(b"linked")
        (place / "linked.bin").symlink_to(blob)
        (place / "folder/again").symlink_to(place)
        (place / "dangling").symlink_to(tmp_path / "nothing")
        os.mkfifo(place / "pipe")
        store = open_store(str(place))
        files = store.files()
        assert set(files) == {*FILES, "linked.bin"}
        assert read(store, files["linked.bin"]) == b"linked"

    def test_a_file_replaced_by_a_twin_is_a_change(self, place, tmp_path):
        store = open_store(str(place))
        file = store.files()["weights.bin"]
        twin = tmp_path / "twin"
        twin.write_bytes(FILES["weights.bin"])
        old = os.stat(place / "weights.bin")
        os.utime(twin, ns=(old.st_atime_ns, old.st_mtime_ns))
        os.replace(twin, place / "weights.bin")
        with pytest.raises(SourceChanged):
            read(store, file)

    def test_a_directory_gone_is_told_from_a_file_gone(self, place):
        store = open_store(str(place))
        file = store.files()["weights.bin"]
        os.rename(place, str(place) + "2")
        with pytest.raises(CheckpointNotFound, match="on this machine"):
            read(store, file)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_no_permission(self, place):
        store = open_store(str(place))
        file = store.files()["weights.bin"]
        (place / "weights.bin").chmod(0)
        with pytest.raises(AccessDenied):
            read(store, file)


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def place(self):
        fs = fsspec.filesystem("memory")
        for path, data in (FILES | HIDDEN).items():
            fs.pipe_file(f"/shelf/model/{path}", data)
        yield fs
        fs.rm("/shelf", recursive=True)

    def root(self, place):
        return "memory://shelf/model"

    def put(self, place, path, data):
        place.pipe_file(f"/shelf/model/{path}", data)

    def delete(self, place, path):
        place.rm_file(f"/shelf/model/{path}")


def fill_s3(s3, folder):
    client = s3.client()
    for path, data in (FILES | HIDDEN).items():
        client.put_object(Bucket=s3.bucket, Key=f"{folder}/{path}", Body=data)
    return client


class TestS3Store(StoreContract):
    @pytest.fixture
    def place(self, s3, tmp_path):
        self.options = s3.storage_options
        self.url = s3.url(tmp_path.name)
        self.prefix = tmp_path.name
        self.bucket = s3.bucket
        return fill_s3(s3, tmp_path.name)

    def root(self, place):
        return self.url

    def put(self, place, path, data):
        place.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}", Body=data)

    def delete(self, place, path):
        place.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}")

    def test_no_bucket(self, place):
        with pytest.raises(CheckpointNotFound, match="no-such-bucket"):
            open_store("s3://no-such-bucket/model", self.options).files()

    def test_every_read_is_conditional(self, place, store, s3):
        file = store.files()["model.safetensors"]
        with s3.recording() as seen:
            read(store, file)
        assert len(seen) == 4
        assert {request.headers["if-match"] for request in seen} == {f'"{file.tag}"'}


class TestS3Trouble:
    """A real S3 behind a proxy that spoils requests."""

    @pytest.fixture(scope="class")
    def folder(self, s3):
        fill_s3(s3, "trouble")
        return "trouble"

    @pytest.fixture
    def proxy(self, s3):
        with FaultyProxy(s3.endpoint) as proxy:
            yield proxy

    @pytest.fixture
    def store(self, s3, folder, proxy):
        # The signature covers the host, so the client must name the server and reach the proxy.
        store = FsspecStore(s3.url(folder), self.options(s3, proxy.url), policy=QUICK)
        yield store
        store.close()

    def options(self, s3, endpoint):
        options = s3.storage_options
        options["client_kwargs"]["endpoint_url"] = endpoint
        return options

    @pytest.mark.parametrize(
        "fault",
        [
            faults.Unavailable(503),
            faults.Unavailable(500),
            faults.Unavailable(429),
            faults.Reset(after_bytes=1000),
            faults.Truncate(after_bytes=1000),
            faults.Shorten(to_bytes=1000),
        ],
        ids=repr,
    )
    def test_a_passing_fault_costs_one_more_request(self, store, proxy, fault):
        file = store.files()["model.safetensors"]
        proxy.seen.clear()
        proxy.rules.append(Rule(fault, "model.safetensors", "GET", nth=(1, 3)))
        assert read(store, file) == BIG
        assert len(proxy.faults) == 2
        assert len(proxy.seen) == 4 + 2

    def test_a_fault_that_stays_names_file_range_and_cause(self, store, proxy):
        file = store.files()["model.safetensors"]
        proxy.seen.clear()
        proxy.rules.append(Rule(faults.Unavailable(503), "model.safetensors", "GET"))
        with pytest.raises(ReadFailed) as caught:
            read(store, file, 5, 25)
        assert "model.safetensors, bytes 5:25" in caught.value.headline
        assert "3 attempts" in str(caught.value)
        assert len(proxy.seen) == QUICK.attempts

    def test_another_etag_is_a_change_even_if_conditions_are_ignored(self, store, proxy):
        file = store.files()["model.safetensors"]
        proxy.rules.append(Rule(faults.ChangeETag(), "model.safetensors", "GET", nth=2))
        with pytest.raises(SourceChanged, match=r"model\.safetensors changed"):
            read(store, file)

    def test_precondition_failed_is_a_change_and_final(self, store, proxy):
        file = store.files()["model.safetensors"]
        proxy.seen.clear()
        proxy.rules.append(Rule(faults.Unavailable(412), "model.safetensors", "GET"))
        with pytest.raises(SourceChanged):
            read(store, file, 0, 10)
        assert len(proxy.seen) == 1

    def test_wrong_secret_names_the_place_and_not_the_secret(self, s3, folder):
        options = s3.storage_options | {"secret": "hunter2hunter2"}
        with pytest.raises(AccessDenied) as caught:
            FsspecStore(s3.url(folder), options, policy=QUICK).files()
        assert s3.url(folder) in caught.value.headline
        assert "AWS_ACCESS_KEY_ID" in str(caught.value)
        assert "hunter2" not in str(caught.value)

    def test_no_credentials(self, s3, folder):
        options = {"client_kwargs": s3.storage_options["client_kwargs"]}
        with pytest.raises(AccessDenied, match="no credentials"):
            FsspecStore(s3.url(folder), options, policy=QUICK).files()

    def test_no_server(self, s3, folder):
        options = self.options(s3, "http://127.0.0.1:9")
        with pytest.raises(ReadFailed, match=r"file list(.|\n)*3 attempts"):
            FsspecStore(s3.url(folder), options, policy=QUICK).files()


def write_folder(folder: Path) -> Path:
    for path, data in (FILES | HIDDEN).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


class TestHubStore(StoreContract):
    pins_content = True

    @pytest.fixture
    def place(self, hub, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        self.repo = f"org/{tmp_path.name.replace('_', '-').strip('-')}"
        self.sha = hub.add_repo(self.repo, write_folder(tmp_path / "repo"))
        yield hub
        hub.remove_repo(self.repo)

    def root(self, place):
        return f"hf://{self.repo}"

    def nowhere(self, place):
        return "hf://org/not-there"

    def put(self, place, path, data):
        place.commit(self.repo, {path: data})

    def delete(self, place, path):
        place.commit(self.repo, {path: None})

    def test_the_revision_becomes_a_commit_by_one_request(self, place, store):
        assert store.revision is None
        with place.recording() as seen:
            store.files()
        assert store.revision == self.sha
        assert len(seen) == 1

    def test_a_revision_is_kept_to(self, place):
        from huggingface_hub import HfApi

        HfApi(token=place.token).create_branch(self.repo, branch="next")
        newer = place.commit(self.repo, {"config.json": b"{ }"}, branch="next")
        store = HubStore(self.root(place), "next")
        assert read(store, store.files()["config.json"]) == b"{ }"
        assert store.revision == newer
        with pytest.raises(CheckpointNotFound, match="no revision 'nope'"):
            HubStore(self.root(place), "nope").files()

    def test_each_file_is_resolved_once_and_the_token_stays_home(self, place, store, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", place.token)
        files = store.files()
        with place.recording() as seen:
            for _ in range(3):
                assert read(store, files["model.safetensors"]) == BIG
            read(store, files["config.json"])
        resolved = [r for r in seen if "/resolve/" in r.path and "model.safetensors" in r.path]
        stored = [r for r in seen if r.host in place.cdn_url]
        assert [r.method for r in resolved] == ["HEAD"]
        assert len(stored) == 3 * 4
        assert not any(r.authorized for r in stored)
        assert all(r.authorized for r in seen if r not in stored)

    def test_an_expired_address_is_resolved_again(self, place, store):
        file = store.files()["model.safetensors"]
        place.cdn_ttl = 1.5  # long enough for one read on a busy machine
        assert read(store, file, 0, 10) == BIG[:10]
        time.sleep(1.6)
        place.cdn_ttl = 60
        with place.recording() as seen:
            assert read(store, file) == BIG
        assert sum("/resolve/" in r.path for r in seen) == 1

    def test_a_refusal_that_stays_is_access_denied(self, place, store):
        file = store.files()["model.safetensors"]
        place.cdn_ttl = -1
        with pytest.raises(AccessDenied):
            read(store, file, 0, 10)

    def test_rate_limits_are_waited_for(self, place):
        store = HubStore(self.root(place), policy=QUICK)
        file = store.files()["model.safetensors"]
        place.fail(429, "/resolve/", retry_after=1)
        before = time.monotonic()
        assert read(store, file, 0, 10) == BIG[:10]
        assert time.monotonic() - before >= 1
        store.close()

    @pytest.mark.parametrize(
        "fault",
        [
            faults.Unavailable(503),
            faults.Unavailable(503, retry_after=0),
            faults.Unavailable(429, retry_after=0),
            faults.Reset(after_bytes=1000),
            faults.Truncate(after_bytes=1000),
            faults.Shorten(to_bytes=1000),
            faults.IgnoreRange(),
        ],
        ids=repr,
    )
    def test_faults_of_the_storage_host(self, place, fault):
        store = HubStore(self.root(place), policy=QUICK)
        file = store.files()["model.safetensors"]
        with FaultyProxy(place.storage_url) as proxy:
            place.cdn_url = proxy.url
            proxy.rules.append(Rule(fault, "model.safetensors", "GET", nth=(2, 3)))
            assert read(store, file) == BIG
            assert len(proxy.faults) == 2
        store.close()

    def test_a_storage_host_that_stays_down(self, place):
        store = HubStore(self.root(place), policy=QUICK)
        file = store.files()["model.safetensors"]
        place.cdn_url = "http://127.0.0.2:9"
        with pytest.raises(ReadFailed) as caught:
            read(store, file, 0, 10)
        assert "bytes 0:10" in caught.value.headline
        assert "Signature=***" in str(caught.value) or "Signature" not in str(caught.value)

    def test_another_size_is_a_change(self, place, store):
        file = store.files()["model.safetensors"]
        with pytest.raises(SourceChanged, match="another size"):
            read(store, replace(file, size=file.size - 1), 0, 10)

    def test_cached_bytes_of_the_pinned_commit_are_used(self, place, store):
        from huggingface_hub import hf_hub_download

        files = store.files()
        hf_hub_download(self.repo, "model.safetensors", cache_dir=os.environ["HF_HUB_CACHE"])
        with place.recording() as seen:
            assert read(store, files["model.safetensors"]) == BIG
        assert seen == []

    def test_the_cache_never_chooses_the_commit(self, place):
        from huggingface_hub import hf_hub_download

        hf_hub_download(self.repo, "model.safetensors", cache_dir=os.environ["HF_HUB_CACHE"])
        self.put(place, "model.safetensors", BIG[::-1])
        store = open_store(self.root(place))
        assert read(store, store.files()["model.safetensors"]) == BIG[::-1]

    def test_offline_the_cache_is_the_hub(self, place, monkeypatch):
        from huggingface_hub import snapshot_download

        online = open_store(self.root(place)).files()
        snapshot_download(self.repo, cache_dir=os.environ["HF_HUB_CACHE"])
        self.put(place, "model.safetensors", BIG[::-1])
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with place.recording() as seen:
            store = open_store(self.root(place))
            assert store.files() == online
            assert store.revision == self.sha
            assert read(store, online["model.safetensors"]) == BIG
            worker = open_store(self.root(place), revision=self.sha)
            assert read(worker, online["config.json"]) == b"{}"
        assert seen == []

    def test_offline_and_not_cached(self, place, monkeypatch):
        store = open_store(self.root(place))
        file = store.files()["model.safetensors"]
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(CheckpointNotFound, match="HF_HUB_OFFLINE"):
            open_store(self.root(place)).files()
        with pytest.raises(CheckpointNotFound, match="switched off"):
            read(store, file, 0, 10)

    def test_a_folder_of_a_repository(self, place):
        store = open_store(f"{self.root(place)}/folder")
        files = store.files()
        assert set(files) == {"deep er/notes.md"}
        assert read(store, files["deep er/notes.md"]) == b"notes"
        with pytest.raises(CheckpointNotFound, match="no-folder"):
            open_store(f"{self.root(place)}/no-folder").files()


class TestHubAccess:
    def test_private_gated_and_wrong_tokens(self, hub, tmp_path, monkeypatch):
        folder = write_folder(tmp_path)
        hub.add_repo("org/private", folder, private=True)
        hub.add_repo("org/gated", folder, gated=True)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        with pytest.raises(CheckpointNotFound, match="private and you are not logged in"):
            open_store("hf://org/private").files()
        with pytest.raises(CheckpointNotFound, match="hf auth login"):
            open_store("hf://org/nothing").files()
        gated = open_store("hf://org/gated")
        with pytest.raises(AccessDenied, match=r"gated(.|\n)*hf auth login"):
            read(gated, gated.files()["model.safetensors"], 0, 9)
        monkeypatch.setenv("HF_TOKEN", "hf_stranger_token")
        with pytest.raises(AccessDenied, match="gated"):
            read(gated, gated.files()["model.safetensors"], 0, 9)
        monkeypatch.setenv("HF_TOKEN", "hf_no_such_token")
        with pytest.raises(AccessDenied, match="credentials"):
            open_store("hf://org/private").files()
        monkeypatch.setenv("HF_TOKEN", hub.token)
        for repo in ("hf://org/private", "hf://org/gated"):
            store = open_store(repo)
            assert read(store, store.files()["config.json"]) == b"{}"

    def test_the_endpoint_is_read_when_it_is_needed(self, hub, monkeypatch):
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(ReadFailed, match=r"file list(.|\n)*3 attempts"):
            HubStore("hf://org/any", policy=QUICK).files()
