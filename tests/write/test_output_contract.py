"""What every output store promises, asked of each of them."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import fsspec
import pytest
from servers import faulty_proxy as faults
from servers.faulty_proxy import FaultyProxy, Rule

from distmerge.checkpoints.retry import RetryPolicy
from distmerge.errors import OutputError
from distmerge.write import local_output, s3_upload
from distmerge.write.fsspec_output import FsspecOutput
from distmerge.write.hub_output import HubOutput
from distmerge.write.output import open_output

QUICK = RetryPolicy(attempts=3, base=0.01, cap=0.02)
PART = 5 * 2**20
"""Bytes: the smallest part that S3 takes."""
BIG = bytes(range(251)) * (2 * PART // 251 + 100)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(s3_upload, "PART", PART)


def write(output: Any, path: str, data: bytes, step: int = 3_000_001) -> Any:
    """A pending file that holds `data`, written from one buffer that is reused."""
    pending = output.open_write(path)
    buffer = bytearray(step)
    for start in range(0, len(data), step):
        piece = data[start : start + step]
        buffer[: len(piece)] = piece
        pending.write(memoryview(buffer)[: len(piece)])
        buffer[:] = bytes(step)
    return pending


class OutputContract:
    """Subclasses give `url` (where nothing is yet), `options` and `raw_names`."""

    options: dict[str, Any] | None = None

    def raw_names(self) -> set[str]:
        """Everything that is there, unfinished things included."""
        raise NotImplementedError

    @pytest.fixture
    def output(self, url):
        opened = open_output(url, self.options)
        opened.begin("0123456789abcdef")
        return opened

    @pytest.mark.parametrize("data", [b"", b"x", BIG[: PART - 1], BIG[:PART], BIG], ids=len)
    def test_a_file_appears_whole_at_commit_and_not_before(self, output, data):
        pending = write(output, "sub/model.safetensors", data)
        assert not output.exists("sub/model.safetensors")
        assert output.list() == {}
        pending.commit()
        assert output.exists("sub/model.safetensors")
        assert output.read_bytes("sub/model.safetensors") == data
        assert output.list()["sub/model.safetensors"].size == len(data)
        pending.discard()
        assert output.exists("sub/model.safetensors")
        assert self.raw_names() == {"sub/model.safetensors"}

    @pytest.mark.parametrize("data", [b"", b"x", BIG], ids=len)
    def test_a_discarded_file_leaves_nothing(self, output, data):
        pending = write(output, "model.safetensors", data)
        pending.discard()
        pending.discard()
        assert self.raw_names() == set()
        assert not output.exists("model.safetensors")

    @pytest.mark.parametrize("data", [b"x", BIG], ids=len)
    def test_a_forgotten_file_is_never_published(self, output, data):
        def fail() -> None:
            pending = write(output, "model.safetensors", data)
            pending.write(memoryview(b"more"))
            raise RuntimeError("the method broke")

        with pytest.raises(RuntimeError):
            fail()
        gc.collect()
        assert not output.exists("model.safetensors")
        assert output.list() == {}
        output.remove_temporaries()
        assert self.raw_names() == set()

    def test_an_old_file_stays_until_the_new_one_is_whole(self, output):
        output.write_bytes("model.safetensors", b"old")
        pending = write(output, "model.safetensors", BIG)
        assert output.read_bytes("model.safetensors") == b"old"
        tag = output.list()["model.safetensors"].tag
        pending.commit()
        assert output.read_bytes("model.safetensors") == BIG
        assert output.list()["model.safetensors"].tag != tag

    def test_small_files_are_made_replaced_listed_and_removed(self, output):
        output.write_bytes(".distmerge/abc/shard-1.json", b"{}")
        output.write_bytes(".distmerge/abd", b"12")
        output.write_bytes("config.json", b"{}")
        output.write_bytes("config.json", b"{ }")
        assert output.read_bytes("config.json") == b"{ }"
        assert set(output.list()) == {
            ".distmerge/abc/shard-1.json",
            ".distmerge/abd",
            "config.json",
        }
        assert set(output.list(".distmerge/ab")) == {
            ".distmerge/abc/shard-1.json",
            ".distmerge/abd",
        }
        assert set(output.list(".distmerge/abc/")) == {".distmerge/abc/shard-1.json"}
        assert output.list("nothing/there") == {}
        output.delete("config.json")
        output.delete("config.json")
        output.delete("never/was")
        assert not output.exists("config.json")
        with pytest.raises(FileNotFoundError):
            output.read_bytes("config.json")

    def test_a_move_keeps_the_bytes_and_replaces(self, output):
        write(output, ".staged/model.safetensors", BIG).commit()
        output.write_bytes("model.safetensors", b"old")
        output.move(".staged/model.safetensors", "model.safetensors")
        assert output.read_bytes("model.safetensors") == BIG
        assert self.raw_names() == {"model.safetensors"}
        with pytest.raises(OutputError):
            output.move(".staged/model.safetensors", "model.safetensors")
        assert output.read_bytes("model.safetensors") == BIG

    def test_a_folder_is_removed_with_all_that_is_below(self, output):
        write(output, ".distmerge/abc/model.safetensors", BIG[:1000]).commit()
        output.write_bytes(".distmerge/abc/model.safetensors.json", b"{}")
        output.write_bytes(".distmerge/answers.json", b"{}")
        output.write_bytes("config.json", b"{}")
        output.remove_below(".distmerge/")
        output.remove_below(".distmerge/")
        assert set(output.list()) == {"config.json"}

    def test_the_lease_is_a_file_like_any_other_but_for_listings(self, output):
        assert not output.exists(".distmerge/lease.json")
        for owner in (b"1", b"22"):
            output.write_bytes(".distmerge/lease.json", owner)
            assert output.read_bytes(".distmerge/lease.json") == owner
        assert output.exists(".distmerge/lease.json")
        output.delete(".distmerge/lease.json")
        output.delete(".distmerge/lease.json")
        assert not output.exists(".distmerge/lease.json")
        with pytest.raises(FileNotFoundError):
            output.read_bytes(".distmerge/lease.json")

    def test_two_attempts_at_one_file_do_not_meet(self, output):
        first = write(output, "model.safetensors", BIG[:1000])
        second = write(output, "model.safetensors", BIG[:2000])
        second.commit()
        first.discard()
        assert output.read_bytes("model.safetensors") == BIG[:2000]

    def test_files_are_written_side_by_side(self, output):
        def one(n: int) -> None:
            write(output, f"shard-{n}", BIG[n : n + 500_000], step=9_999).commit()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, range(8)))
        for n in range(8):
            assert output.read_bytes(f"shard-{n}") == BIG[n : n + 500_000]

    @pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a\\b", "C:x"])
    def test_paths_stay_inside(self, output, path):
        with pytest.raises(OutputError, match="not a path inside"):
            output.write_bytes(path, b"")
        with pytest.raises(OutputError, match="not a path inside"):
            output.open_write(path)

    def test_free_bytes_is_a_number_or_unknown(self, output):
        free = output.free_bytes()
        assert free is None or free > 0


class TestLocalOutput(OutputContract):
    @pytest.fixture
    def url(self, tmp_path):
        self.folder = tmp_path / "not yet" / "there"
        return str(self.folder)

    def raw_names(self):
        return {
            p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file()
        }

    def test_nothing_is_made_before_the_first_file(self, output):
        assert output.list() == {}
        assert not output.exists("x")
        assert output.remove_temporaries() == 0
        assert output.free_bytes() is not None
        assert not self.folder.exists()

    def test_what_a_killed_run_left_is_swept(self, output):
        output.write_bytes("model.safetensors", b"whole")
        pid = os.fork()
        if pid == 0:
            write(output, "sub/model-2.safetensors", b"half")
            os._exit(0)
        os.waitpid(pid, 0)
        assert len(self.raw_names()) == 2
        assert set(output.list()) == {"model.safetensors"}
        assert output.remove_temporaries() == 1
        assert self.raw_names() == {"model.safetensors"}

    def test_bytes_are_durable_before_the_name(self, output, monkeypatch):
        calls = []
        for name in ("fsync", "replace"):
            real = getattr(os, name)
            monkeypatch.setattr(
                local_output.os,
                name,
                lambda *a, real=real, name=name: (calls.append(name), real(*a))[1],
            )
        output.write_bytes("x", b"y")
        assert calls == ["fsync", "replace", "fsync"]

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        output = open_output(tmp_path / "file")
        with pytest.raises(OutputError, match="in its way"):
            output.write_bytes("x", b"")
        (tmp_path / "out/x").mkdir(parents=True)
        with pytest.raises(OutputError, match="in its way"):
            open_output(tmp_path / "out").write_bytes("x", b"")
        assert list((tmp_path / "out").iterdir()) == [tmp_path / "out/x"]

    def test_no_permission_or_no_room(self):
        with pytest.raises(OutputError, match=r"may not write|read-only|Could not write"):
            open_output("/proc/distmerge").write_bytes("x", b"")
        pending = local_output.PendingLocalFile.__new__(local_output.PendingLocalFile)
        pending._path = "/dev/full"
        with open("/dev/full", "wb", buffering=0) as full:
            pending._file = full
            with pytest.raises(OutputError, match="No room"):
                pending.write(memoryview(b"x"))

    def test_names(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert open_output("org/name").root == str(tmp_path / "org/name")
        assert open_output("~/out/").root == str(tmp_path / "home/out")
        assert open_output(f"file://{tmp_path}/a b").root == str(tmp_path / "a b")


class TestMemoryOutput(OutputContract):
    @pytest.fixture
    def url(self, tmp_path):
        self.folder = f"/{tmp_path.name}"
        yield f"memory://{tmp_path.name}/out/"
        fs = fsspec.filesystem("memory")
        if fs.exists(self.folder):
            fs.rm(self.folder, recursive=True)

    def raw_names(self):
        found = fsspec.filesystem("memory").find(self.folder)
        return {path.removeprefix(f"{self.folder}/out/") for path in found}


class TestS3Output(OutputContract):
    @pytest.fixture
    def url(self, s3, tmp_path):
        self.s3, self.prefix = s3, f"{tmp_path.name}/out/"
        self.options = s3.storage_options
        return s3.url(f"{tmp_path.name}/out")

    def raw_names(self):
        keys = [*self.s3.keys(self.prefix), *self.s3.unfinished_uploads(self.prefix)]
        return {key.removeprefix(self.prefix) for key in keys}

    def test_leftovers_of_other_outputs_are_not_swept(self, output, s3):
        stranger = s3.client()
        key = self.prefix.rstrip("/") + "-other/x"
        upload = stranger.create_multipart_upload(Bucket=s3.bucket, Key=key)["UploadId"]
        assert output.remove_temporaries() == 0
        assert s3.unfinished_uploads(key) == [key]
        stranger.abort_multipart_upload(Bucket=s3.bucket, Key=key, UploadId=upload)

    def test_options_may_be_given_by_prefix(self, url, s3):
        nested = {f"s3://{s3.bucket}/": s3.storage_options, "s3://other/": {"key": "wrong"}}
        open_output(url, nested).write_bytes("x", b"1")
        assert self.raw_names() == {"x"}
        open_output(f"s3://{s3.bucket}", nested).delete(f"{self.prefix}x")
        assert self.raw_names() == set()

    def test_no_bucket(self, s3):
        output = open_output("s3://no-such-bucket/out", s3.storage_options)
        with pytest.raises(OutputError, match="bucket"):
            output.write_bytes("x", b"")
        with pytest.raises(OutputError, match="bucket"):
            write(output, "x", BIG).commit()

    def test_wrong_secret(self, url, s3):
        options = s3.storage_options | {"secret": "hunter2hunter2"}
        output = FsspecOutput(url, options, policy=QUICK)
        with pytest.raises(OutputError, match="may not write") as caught:
            output.write_bytes("x", b"")
        assert "hunter2" not in str(caught.value)
        with pytest.raises(OutputError, match="may not write"):
            output.exists("x")

    @pytest.mark.parametrize(
        "rule",
        [
            Rule(faults.Unavailable(503), "partNumber=2", "PUT", nth=1),
            Rule(faults.Unavailable(500), "uploads", "POST", nth=1),
            Rule(faults.Unavailable(503), "uploadId", "POST", nth=1),
        ],
        ids=lambda rule: rule.path,
    )
    def test_a_passing_fault_does_no_harm(self, url, s3, rule):
        with FaultyProxy(s3.endpoint, [rule]) as proxy:
            self.options["client_kwargs"]["endpoint_url"] = proxy.url
            output = FsspecOutput(url, self.options, policy=QUICK)
            write(output, "model.safetensors", BIG).commit()
            assert proxy.faults
        assert open_output(url, s3.storage_options).read_bytes("model.safetensors") == BIG

    def test_an_answer_that_got_lost_is_looked_for(self, url, s3):
        lost = Rule(faults.Reset(), "uploadId", "POST", nth=1)
        with FaultyProxy(s3.endpoint, [lost]) as proxy:
            self.options["client_kwargs"]["endpoint_url"] = proxy.url
            write(FsspecOutput(url, self.options, policy=QUICK), "m.safetensors", BIG).commit()
            assert len(proxy.faults) == 1
        assert open_output(url, s3.storage_options).read_bytes("m.safetensors") == BIG

    def test_parts_are_sent_side_by_side_and_not_too_many(self, url, s3):
        with FaultyProxy(s3.endpoint, [Rule(faults.Slow(0.5), "partNumber", "PUT")]) as proxy:
            self.options["client_kwargs"]["endpoint_url"] = proxy.url
            pending = FsspecOutput(url, self.options, policy=QUICK).open_write("m.safetensors")
            part = memoryview(bytes(PART))
            begin, sent = time.monotonic(), []
            for _ in range(8):
                pending.write(part)
                sent.append(time.monotonic() - begin)
            pending.commit()
            assert time.monotonic() - begin < 8 * 0.5
            assert sent[s3_upload.IN_FLIGHT] - sent[0] > 0.4  # the fifth waits for a first
        assert open_output(url, s3.storage_options).list()["m.safetensors"].size == 8 * PART

    @pytest.mark.full
    def test_memory_stays_within_what_is_planned(self, url, s3, monkeypatch):
        monkeypatch.setattr(s3_upload, "PART", 16 << 20)
        code = """
import json, resource, sys
from distmerge.write.output import open_output
output = open_output(sys.argv[1], json.loads(sys.argv[2]))
output.write_bytes("warm", b"up")
part = memoryview(bytes(1 << 20))
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10
before = peak()
pending = output.open_write("model.safetensors")
for _ in range(400):
    pending.write(part)
pending.commit()
print(output.buffers, peak() - before)
"""
        command = [sys.executable, "-c", code, url, json.dumps(self.options)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        planned, measured = map(int, ran.stdout.split())
        assert measured <= planned, (measured, planned)
        assert planned == 6 * (16 << 20)

    def test_a_part_that_fails_for_good_leaves_no_upload(self, url, s3):
        rule = Rule(faults.Unavailable(503), "partNumber=2", "PUT")
        with FaultyProxy(s3.endpoint, [rule]) as proxy:
            self.options["client_kwargs"]["endpoint_url"] = proxy.url
            pending = write(FsspecOutput(url, self.options, policy=QUICK), "m.safetensors", BIG)
            with pytest.raises(OutputError, match="Could not write") as caught:
                pending.commit()
            assert "3 attempts" in str(caught.value)
        assert self.raw_names() == set()

    def test_a_completion_that_fails_publishes_nothing(self, url, s3):
        rule = Rule(faults.Unavailable(403), "uploadId", "POST")
        with FaultyProxy(s3.endpoint, [rule]) as proxy:
            self.options["client_kwargs"]["endpoint_url"] = proxy.url
            pending = write(FsspecOutput(url, self.options, policy=QUICK), "m.safetensors", BIG)
            with pytest.raises(OutputError, match="may not write"):
                pending.commit()
        assert self.raw_names() == set()


class TestHubOutput(OutputContract):
    """What isn't published yet lies on a working branch and in memory."""

    @pytest.fixture
    def url(self, hub, tmp_path, monkeypatch):
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        self.hub, self.space = hub, tmp_path / "tmp"
        self.repo = f"org/out-{uuid.uuid4().hex[:8]}"
        yield f"hf://{self.repo}"
        with suppress(KeyError):
            hub.remove_repo(self.repo)

    @pytest.fixture
    def output(self, url):
        self.output = HubOutput(url, policy=QUICK)
        self.output.begin("0123456789abcdef")
        return self.output

    def raw_names(self):
        return {*self.output.list(), *(path.name for path in self.space.iterdir())}

    def published(self):
        return {k: v for k, v in self.hub.files(self.repo).items() if k != ".gitattributes"}

    def test_nothing_is_on_the_target_before_one_commit_puts_all_there(self, output):
        output.write_bytes("old.txt", b"1")
        output.write_bytes("model.safetensors.index.json", b"{}")
        write(output, "model-1.safetensors", BIG).commit()
        output.publish("first", "")
        assert set(self.published()) == {
            "model-1.safetensors",
            "model.safetensors.index.json",
            "old.txt",
        }
        before = self.hub.branches(self.repo)["main"]

        output = HubOutput(f"hf://{self.repo}", policy=QUICK)
        output.begin("fedcba9876543210")
        output.delete("model.safetensors.index.json")
        output.delete("model-1.safetensors")
        write(output, "model-2.safetensors", BIG[::-1]).commit()
        output.write_bytes(".distmerge/fedcba9876543210/model-2.safetensors.json", b"{}")
        output.write_bytes("config.json", b"{}")
        write(output, "tokenizer.json", b"[]").commit()
        output.write_bytes("model.safetensors.index.json", b"{ }")
        assert set(output.list()) == {
            ".distmerge/fedcba9876543210/model-2.safetensors.json",
            "config.json",
            "model-2.safetensors",
            "model.safetensors.index.json",
            "old.txt",
            "tokenizer.json",
        }
        assert self.hub.branches(self.repo)["main"] == before
        with self.hub.recording() as seen:
            assert output.publish("second", "text") == f"hf://{self.repo}"
        assert "PUT" not in [request.method for request in seen]  # copies on the server
        assert sum(r.path.endswith("/commit/main") for r in seen) == 1
        assert self.published() == {
            "config.json": b"{}",
            "model-2.safetensors": BIG[::-1],
            "model.safetensors.index.json": b"{ }",
            "old.txt": b"1",
            "tokenizer.json": b"[]",
        }
        output.remove_below(".distmerge/")
        assert set(self.hub.branches(self.repo)) == {
            "main",
            "distmerge-0123456789abcdef",
        }
        assert output.remove_temporaries() == 1
        assert set(self.hub.branches(self.repo)) == {"main"}

    def test_another_machine_sees_what_this_one_has_finished(self, output):
        path = ".distmerge/0123456789abcdef/model-1.safetensors.json"
        write(output, "model-1.safetensors", BIG).commit()
        with self.hub.recording() as seen:
            output.write_bytes(path, b"{}")
        assert sum("/commit/" in r.path for r in seen) == 1  # the shard with its receipt
        other = HubOutput(f"hf://{self.repo}", policy=QUICK)
        assert set(other.list()) == set()
        other.begin("0123456789abcdef")
        assert set(other.list()) == {"model-1.safetensors", path}
        assert other.read_bytes("model-1.safetensors") == BIG
        other.publish("published elsewhere", "")
        assert set(self.published()) == {"model-1.safetensors"}

    def test_a_repository_is_made_private(self, output):
        from huggingface_hub import HfApi

        output.write_bytes(".distmerge/lease.json", b"{}")
        assert HfApi(token=self.hub.token).model_info(self.repo).private
        assert self.published() == {}

    def test_a_branch_is_made_with_nothing_but_the_output(self, output, hub):
        hub.add_repo(self.repo, self.space)
        hub.commit(self.repo, {".gitattributes": b"*.safetensors filter=lfs"})
        hub.commit(self.repo, {"model.safetensors": b"another model"})
        output = HubOutput(f"hf://{self.repo}@dev", policy=QUICK)
        output.begin("0123456789abcdef")
        assert output.list() == {}
        output.write_bytes("config.json", b"{}")
        write(output, "model.safetensors", BIG).commit()
        assert output.publish("on a branch", "") == f"hf://{self.repo}@dev"
        files = hub.files(self.repo, "dev")
        assert files["model.safetensors"] == BIG
        assert set(files) - {".gitattributes"} == {"config.json", "model.safetensors"}
        assert self.published() == {"model.safetensors": b"another model"}

    def test_a_pull_request_leaves_the_target_alone(self, url, hub):
        hub.add_repo(self.repo, self.space)
        hub.commit(self.repo, {"model.safetensors": b"old", "README.md": b"mine"})
        output = open_output(url, pull_request=True)
        output.begin("0123456789abcdef")
        output.delete("model.safetensors")
        write(output, "model-1.safetensors", BIG).commit()
        assert output.publish("proposed", "") == f"hf://{self.repo}@refs/pr/1"
        assert self.published() == {"model.safetensors": b"old", "README.md": b"mine"}
        proposed = {"model-1.safetensors": BIG, "README.md": b"mine"}
        assert hub.files(self.repo, "refs/pr/1") == proposed

    @pytest.mark.parametrize("too_late", [False, True])
    @pytest.mark.parametrize(
        "path",
        ["/commit/distmerge", "/commit/main", "/branch/", "lfs/objects", "/uploads/", "tree"],
    )
    def test_a_passing_fault_does_no_harm(self, output, hub, path, too_late):
        hub.add_repo(self.repo, self.space)
        hub.commit(self.repo, {"old.txt": b"old"})
        output.delete("old.txt")
        self.hub.fail(503, path, too_late=too_late)
        write(output, ".distmerge/model.safetensors", BIG).commit()
        output.write_bytes(".distmerge/receipt.json", b"{}")
        output.write_bytes("config.json", b"{}")
        output.move(".distmerge/model.safetensors", "model.safetensors")
        output.publish("through", "")
        output.remove_below(".distmerge/")
        assert self.published() == {"config.json": b"{}", "model.safetensors": BIG}
        assert set(self.hub.branches(self.repo)) == {"main"}
        assert list(self.space.iterdir()) == []

    def test_commits_of_workers_that_meet_are_repeated(self, output):
        self.hub.fail(412, "/commit/distmerge", times=2)
        output.write_bytes(".distmerge/receipt.json", b"{}")
        assert output.read_bytes(".distmerge/receipt.json") == b"{}"

    @pytest.mark.parametrize("token", ["hf_read_token", "hf_no_such_token", ""])
    def test_who_may_not_write_is_told_so(self, url, token, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", token)
        output = open_output(url)
        with pytest.raises(OutputError, match="may not write") as caught:
            output.write_bytes(".distmerge/lease.json", b"")
        assert "HF_TOKEN" in str(caught.value)
        assert not token or token not in str(caught.value)

    def test_a_token_may_be_given_for_the_hub_alone(self, url, hub, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        open_output(url, {"hf://": {"token": hub.token}}).write_bytes(".distmerge/lease.json", b"")
        with pytest.raises(OutputError, match="may not write"):
            open_output(url, {"token": hub.token}).write_bytes(".distmerge/lease.json", b"")

    def test_temporary_space_of_the_dead_is_freed_and_of_the_living_is_not(self, output):
        alive = write(output, "model.safetensors", BIG)
        pid = os.fork()
        if pid == 0:
            kept = write(output, "other.safetensors", BIG)
            assert kept
            os._exit(0)
        os.waitpid(pid, 0)
        assert len(list(self.space.iterdir())) == 2
        assert output.remove_temporaries() == 1
        alive.commit()
        assert output.read_bytes("model.safetensors") == BIG
        assert list(self.space.iterdir()) == []

    @pytest.mark.parametrize(
        "name",
        [
            "hf://org/name/folder",
            "hf://name",
            "hf://org/name@refs/pr/1",
            "hf://org/name@distmerge-lease",
            f"hf://org/name@{'0' * 40}",
        ],
    )
    def test_places_that_are_no_output(self, name):
        with pytest.raises(OutputError, match="can't be written"):
            open_output(name)


@pytest.mark.parametrize("out", ["hf://org/name@dev", "s3://bucket/x", "here"])
def test_pull_requests_are_the_main_branchs(out):
    with pytest.raises(OutputError, match="pull request"):
        open_output(out, pull_request=True)


@pytest.mark.parametrize("url", ["", "s3://key:secret@bucket/x", "nosuchscheme://x"])
def test_names_that_are_no_output(url):
    with pytest.raises(OutputError) as caught:
        open_output(url)
    assert "secret" not in str(caught.value)
