"""Spools: each byte is fetched once, by however many threads and processes; what isn't whole, or is
another version's, is never served."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmerge.checkpoints import spool
from distmerge.checkpoints.local_store import LocalStore
from distmerge.checkpoints.ranges import Covered
from distmerge.checkpoints.spool import SpooledStore, folder_of, make, remove, used_bytes
from distmerge.checkpoints.tensors import FileInfo

SIZE = 300_000
PROCESSES = multiprocessing.get_context("forkserver")


class Noting(LocalStore):
    """A store that notes in a file which ranges it is asked for."""

    def __init__(self, root: str, notes: Path) -> None:
        super().__init__(root)
        self._notes = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def read_into(self, file: FileInfo, start: int, buffer: memoryview) -> None:
        os.write(self._notes, b"%d %d\n" % (start, start + len(buffer)))
        super().read_into(file, start, buffer)

    def close(self) -> None:
        os.close(self._notes)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model of one file."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(random.Random(0).randbytes(SIZE))
    return tmp_path


@pytest.fixture
def place(folder) -> Iterator[str]:
    """Of a spool with plenty of room."""
    place = str(folder / f"{spool.PREFIX}x")
    with make(place, limit=100 * SIZE):
        yield place
    remove(place)


def opened(folder: Path, place: str) -> SpooledStore:
    return SpooledStore(Noting(str(folder / "model"), folder / "notes"), place)


def fetched(folder: Path) -> list[int]:
    """How often each byte was fetched."""
    times = [0] * SIZE
    for line in (folder / "notes").read_text().splitlines():
        for at in range(*map(int, line.split())):
            times[at] += 1
    return times


def check(store: SpooledStore, folder: Path, start: int, stop: int) -> None:
    buffer = bytearray(stop - start)
    store.read_into(store.files()["weights"], start, memoryview(buffer))
    assert buffer == (folder / "model" / "weights").read_bytes()[start:stop]


def read_ranges(folder: Path, place: str, seed: int) -> None:
    """Some forty ranges, by four threads, and at last all."""
    draw, store = random.Random(seed), opened(folder, place)
    spans = [sorted(draw.sample(range(SIZE + 1), 2)) for _ in range(40)] + [[0, SIZE]]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(check, store, folder, *span) for span in spans]:
            done.result()
    store.close()


def test_threads_that_want_the_same_fetch_it_once(folder, place):
    read_ranges(folder, place, seed=1)
    assert set(fetched(folder)) == {1}


def test_two_processes_share_a_spool(folder, place):
    several = [PROCESSES.Process(target=read_ranges, args=(folder, place, n)) for n in (1, 2)]
    for process in several:
        process.start()
    for process in several:
        process.join(120)
        assert process.exitcode == 0
    assert set(fetched(folder)) == {1}
    assert used_bytes(folder_of(place)) >= SIZE


def read_and_die(folder: Path, place: str, call: str) -> None:
    """Killed at its second fetch, or after bytes are written and before they are listed."""
    store = opened(folder, place)
    check(store, folder, 0, 1000)
    if call == "fetch":
        store._inner.read_into = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
    else:
        write = os.write

        def stopping(file: int, data: bytes) -> int:
            if data.endswith(b"."):
                os.kill(os.getpid(), signal.SIGKILL)
            return write(file, data)

        os.write = stopping
    check(store, folder, 500, 200_000)


@pytest.mark.parametrize("call", ["fetch", "list"])
def test_what_a_killed_process_left_is_used_where_it_is_whole(folder, place, call):
    process = PROCESSES.Process(target=read_and_die, args=(folder, place, call))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (folder / "notes").write_text("")
    with make(place, limit=10 * SIZE):
        store = opened(folder, place)
        check(store, folder, 0, SIZE)
    times = fetched(folder)
    assert set(times[:1000]) == {0}
    assert set(times[1000:]) == {1}


def test_reading_through_it_takes_no_memory(folder, place):
    big = 16 << 20
    with (folder / "model" / "weights").open("r+b") as file:
        file.truncate(big)
    buffer = memoryview(bytearray(big))
    tracemalloc.start()
    try:
        for _ in range(2):
            store = opened(folder, place)
            store.read_into(store.files()["weights"], 0, buffer)
        assert tracemalloc.get_traced_memory()[1] < big // 16
    finally:
        tracemalloc.stop()


def test_another_version_of_a_file_is_another_file(folder, place):
    store = opened(folder, place)
    check(store, folder, 0, SIZE)
    (folder / "model" / "weights").write_bytes(random.Random(1).randbytes(SIZE))
    check(opened(folder, place), folder, 0, SIZE)
    assert set(fetched(folder)) == {2}


def test_leftovers_that_may_be_wrong_are_fetched_again(folder, place, monkeypatch):
    file = opened(folder, place).files()["weights"]
    lists = folder_of(place) / (spool.spooled_name(str(folder / "model"), file) + ".ranges")
    check(opened(folder, place), folder, 0, 1000)
    with lists.open("a") as cut:
        cut.write("\n1000 2")  # by a full disk
    check(opened(folder, place), folder, 500, 1500)
    check(opened(folder, place), folder, 0, 3000)
    assert set(fetched(folder)[:3000]) == {1}
    with monkeypatch.context() as other:  # the machine was started anew
        other.setattr(spool, "boot_id", lambda: "another")
        make(place, limit=10 * SIZE).close()
    check(opened(folder, place), folder, 0, 3000)
    assert set(fetched(folder)[:3000]) == {2}
    make(place, limit=10 * SIZE, wanted=[]).close()
    check(opened(folder, place), folder, 0, 3000)
    assert set(fetched(folder)[:3000]) == {3}


def test_a_size_alone_pins_nothing_for_later_runs(folder, place):
    store = opened(folder, place)
    file = replace(store.files()["weights"], tag=str(SIZE))
    spooled = folder_of(place) / (spool.spooled_name(store.root, file) + ".data")
    spooled.touch()
    make(place, limit=SIZE).close()
    assert not spooled.exists()


def test_beyond_its_limit_bytes_are_read_again(folder):
    place = str(folder / f"{spool.PREFIX}x")
    with make(place, limit=120_000):
        store = opened(folder, place)
        for _ in range(2):
            for start in range(0, SIZE, 50_000):
                check(store, folder, start, start + 50_000)
        assert used_bytes(folder_of(place)) <= 120_000
        times = fetched(folder)
        assert set(times[:100_000]) == {1}
        assert set(times[200_000:]) == {2}
        assert spool.was_full(place)


def test_without_a_spool_reads_go_to_the_store(folder, place):
    store = opened(folder, place)
    check(store, folder, 0, 1000)
    remove(place)
    check(store, folder, 0, 2000)
    check(opened(folder, place), folder, 0, 3000)
    assert not folder_of(place).exists()


def test_abandoned_spools_are_removed_and_used_ones_left(folder, place):
    abandoned, used = (str(folder / f"{spool.PREFIX}{name}") for name in "ab")
    make(abandoned, limit=SIZE).close()
    with make(used, limit=SIZE):
        make(place, limit=SIZE).close()
        assert folder_of(used).exists()
        assert not folder_of(abandoned).exists()
        remove(used)


def test_a_link_to_elsewhere_is_no_spool(folder):
    place = str(folder / f"{spool.PREFIX}x")
    make(str(folder / "bait"), limit=SIZE).close()
    folder_of(place).symlink_to(folder_of(str(folder / "bait")))
    with pytest.raises(PermissionError, match="somebody else"):
        make(place, limit=SIZE)
    check(opened(folder, place), folder, 0, 1000)
    check(opened(folder, place), folder, 0, 1000)
    assert set(fetched(folder)[:1000]) == {2}


SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted), max_size=12)


@given(SPANS, st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted))
@settings(max_examples=100)
def test_covered_is_a_set_of_bytes(spans, asked):
    there, covered = set(), Covered()
    for start, stop in spans:
        there |= set(range(start, stop))
        covered.add(start, stop)
    missing = covered.missing(*asked)
    assert {at for span in missing for at in range(*span)} == set(range(*asked)) - there
    assert all(a < b for a, b in missing)
    assert all(b < c for (_, b), (c, _) in pairwise(missing))
