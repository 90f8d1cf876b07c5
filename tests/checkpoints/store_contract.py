"""What every store promises, as tests for each kind of store to inherit."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from distmerge.checkpoints import parallel
from distmerge.checkpoints.opening import open_store
from distmerge.checkpoints.retry import RetryPolicy
from distmerge.errors import CheckpointNotFound, ReadFailed, SourceChanged

PART = 50_000
QUICK = RetryPolicy(attempts=3, base=0.01, cap=0.02)
BIG = bytes((i * i + i // 251) % 256 for i in range(3 * PART + 5007))
FILES = {
    "config.json": b"{}",
    "empty.txt": b"",
    "folder/deep er/notes.md": b"notes",
    "model.safetensors": BIG,
    "weights.bin": BIG[::-1],
}
HIDDEN = {".gitattributes": b"x", ".cache/y": b"y", "folder/.hidden": b"z"}


def read(store: Any, file: Any, start: int = 0, stop: int | None = None) -> bytes:
    buffer = bytearray((file.size if stop is None else stop) - start)
    store.read_into(file, start, memoryview(buffer))
    return bytes(buffer)


class StoreContract:
    """Subclasses give `place`: a root holding FILES and HIDDEN, and ways to change it."""

    options: dict[str, Any] | None = None
    pins_content = False
    """Whether bytes that were pinned stay readable after a change."""

    def put(self, place: Any, path: str, data: bytes) -> None:
        raise NotImplementedError

    def delete(self, place: Any, path: str) -> None:
        raise NotImplementedError

    def root(self, place: Any) -> str:
        raise NotImplementedError

    def nowhere(self, place: Any) -> str:
        return self.root(place) + "-is-not-there"

    @pytest.fixture(autouse=True)
    def _small_parts(self, monkeypatch):
        monkeypatch.setattr(parallel, "PART", PART)

    @pytest.fixture
    def store(self, place):
        store = open_store(self.root(place), self.options)
        yield store
        store.close()

    def test_lists_every_visible_file_with_its_size(self, store):
        files = store.files()
        assert {path: info.size for path, info in files.items()} == {
            path: len(data) for path, data in FILES.items()
        }
        assert list(files) == sorted(files)
        assert all(info.path == path for path, info in files.items())

    @pytest.mark.parametrize(
        ("start", "stop"),
        [(0, 1), (0, len(BIG)), (17, 17), (PART - 1, 2 * PART + 1), (len(BIG) - 1, len(BIG))],
    )
    def test_reads_exactly_the_range(self, store, start, stop):
        files = store.files()
        around = bytearray(b"\xaa" * (stop - start + 10))
        store.read_into(files["model.safetensors"], start, memoryview(around)[5 : 5 + stop - start])
        assert around[5 : 5 + stop - start] == BIG[start:stop]
        assert around[:5] == around[len(around) - 5 :] == b"\xaa" * 5

    def test_reads_into_buffers_of_any_element_type(self, store):
        file = store.files()["model.safetensors"]
        buffer = bytearray(8 * 100)
        store.read_into(file, 3, memoryview(buffer).cast("d"))
        assert buffer == BIG[3:803]

    def test_reads_small_and_empty_files(self, store):
        files = store.files()
        assert {path: read(store, info) for path, info in files.items()} == FILES

    def test_many_threads_read_at_once(self, store):
        files = store.files()
        wanted = [
            (path, start, start + length)
            for path in ("model.safetensors", "weights.bin")
            for start, length in ((n * 6007, 1 + n * 4001) for n in range(12))
        ]
        with ThreadPoolExecutor(12) as pool:
            got = pool.map(lambda w: read(store, files[w[0]], w[1], w[2]), wanted)
        assert list(got) == [FILES[path][start:stop] for path, start, stop in wanted]

    def test_a_range_past_the_end_is_refused(self, store):
        file = store.files()["config.json"]
        with pytest.raises(ReadFailed, match=r"config\.json has no bytes 1:3"):
            read(store, file, 1, 3)

    def test_another_process_needs_root_and_revision_alone(self, store, place):
        file = store.files()["weights.bin"]
        other = open_store(store.root, self.options, revision=store.revision)
        assert read(other, file, 5, 99) == FILES["weights.bin"][5:99]
        other.close()

    def test_tags_stay_and_change_with_the_content(self, store, place):
        before = store.files()
        again = open_store(self.root(place), self.options)
        assert again.files() == before
        time.sleep(0.02)
        self.put(place, "weights.bin", BIG)
        after = open_store(self.root(place), self.options).files()
        changed = {path for path in before if before[path] != after[path]}
        assert changed == {"weights.bin"}

    def test_a_change_after_pinning_is_never_a_mix(self, store, place):
        files = store.files()
        time.sleep(0.02)
        self.put(place, "model.safetensors", BIG[::-1])
        if self.pins_content:
            assert read(store, files["model.safetensors"]) == BIG
        else:
            with pytest.raises(SourceChanged, match=r"model\.safetensors"):
                read(store, files["model.safetensors"])

    def test_a_file_that_got_shorter_is_a_change(self, store, place):
        files = store.files()
        self.put(place, "model.safetensors", BIG[:100])
        if self.pins_content:
            assert read(store, files["model.safetensors"]) == BIG
        else:
            with pytest.raises(SourceChanged, match=r"model\.safetensors"):
                read(store, files["model.safetensors"])

    def test_a_file_that_went_is_a_change(self, store, place):
        files = store.files()
        self.delete(place, "weights.bin")
        if self.pins_content:
            assert read(store, files["weights.bin"]) == FILES["weights.bin"]
        else:
            with pytest.raises(SourceChanged, match=r"weights\.bin"):
                read(store, files["weights.bin"])

    def test_nothing_there(self, place):
        with pytest.raises(CheckpointNotFound):
            open_store(self.nowhere(place), self.options).files()
