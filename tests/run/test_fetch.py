"""From tensors wanted to tensors in memory: which bytes are read, and how they are seen."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmerge.checkpoints.local_store import LocalStore
from distmerge.checkpoints.tensors import TensorInfo
from distmerge.errors import SourceChanged
from distmerge.methods.blocks import Grid
from distmerge.plan.work import Source
from distmerge.run.arena import Arena
from distmerge.run.fetch import GAP, Fetched, Fetcher, Wanted, ranges, rows_of

NBYTES = 600_000
CONTENT = np.random.default_rng(0).integers(0, 256, NBYTES, np.uint8).tobytes()
DTYPES = {"U8": (torch.uint8, 1), "BF16": (torch.bfloat16, 2), "I32": (torch.int32, 4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("files")
    (place / "weights").write_bytes(CONTENT)
    return place


@pytest.fixture(scope="module")
def reader(folder):
    """Fetches from that file."""
    arena = Arena(1 << 20)
    store = LocalStore(str(folder))
    fetcher = Fetcher(arena, lambda source: store)
    yield fetcher, {(0, 0): Source("file", str(folder), None, store.files())}
    arena.close()
    fetcher.close()


spans = st.lists(
    st.tuples(st.integers(0, 10**7), st.integers(1, 10**6)).map(lambda s: (s[0], s[0] + s[1])),
    min_size=1,
    max_size=40,
)


@given(spans)
def test_ranges_cover_what_is_wanted_and_little_more(wanted):
    found = ranges(wanted)
    assert found == sorted(found)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))
    for start, stop in wanted:
        assert sum(first <= start and stop <= last for first, last in found) == 1
    edges = sorted({edge for span in wanted for edge in span})
    exact = sum(
        b - a
        for a, b in itertools.pairwise(edges)
        if any(start <= a and b <= stop for start, stop in wanted)
    )
    assert exact <= sum(stop - start for start, stop in found) <= exact * 5 // 4


def test_small_holes_are_read_along_and_large_ones_are_not():
    assert ranges([(0, 10**6), (10**6 + GAP, 2 * 10**6)]) == [(0, 2 * 10**6)]
    assert ranges([(0, 10**6), (10**6 + GAP + 1, 2 * 10**6)]) == [
        (0, 10**6),
        (10**6 + GAP + 1, 2 * 10**6),
    ]
    assert ranges([(0, 100), (200, 300)]) == [(0, 100), (200, 300)]  # a hole as long as they are


@st.composite
def wants(draw) -> list[Wanted]:
    found = []
    for task in range(draw(st.integers(1, 12))):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        item = DTYPES[dtype][1]
        elements = draw(st.integers(0, 9000))
        start = draw(st.integers(0, NBYTES - elements * item))
        info = TensorInfo(dtype, (elements,), "weights", start, start + elements * item)
        first = draw(st.integers(0, elements))
        found.append(Wanted(task, 0, info, (first, draw(st.integers(first, elements)))))
    return found


@settings(deadline=None)
@given(wanted=wants())
def test_spans_of_tensors_at_any_byte_are_what_the_file_holds(reader, wanted):
    fetcher, sources = reader
    fetched = fetcher.fetch(wanted, sources)
    for want in wanted:
        dtype, item = DTYPES[want.info.dtype]
        if want.info.stop == want.info.start or want.span[0] == want.span[1]:
            continue
        block = fetched.block(want.task, 0, want.span)
        expected = CONTENT[want.info.start :][want.span[0] * item : want.span[1] * item]
        assert block.dtype == dtype
        assert block.data_ptr() % item == 0
        assert block.view(torch.uint8).numpy().tobytes() == expected
    fetcher.release(fetched)
    assert fetched == Fetched(leases=fetched.leases, nbytes=fetched.nbytes)


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
    order=st.permutations(range(4)),
    start=st.integers(0, 100),
)
def test_blocks_of_strided_tensors_come_row_by_row(reader, shape, order, start):
    fetcher, sources = reader
    # A tensor that was saved after a permutation of its dimensions.
    order = [axis for axis in order if axis < len(shape)]
    stored = torch.frombuffer(
        bytearray(CONTENT[start : start + 2 * np.prod(shape)]), dtype=torch.int16
    )
    view = stored.view([shape[axis] for axis in order]).permute(np.argsort(order).tolist())
    info = TensorInfo("I16", shape, "weights", start, start + 2 * stored.numel(), view.stride())
    elements = stored.numel()
    fetched = fetcher.fetch([Wanted(0, 0, info, (0, elements))], sources)
    flat = view.reshape(-1)
    row = shape[-1]
    for span in [(0, elements), (0, row), (elements - row, elements), (row // 2, row)]:
        assert torch.equal(fetched.block(0, 0, span), flat[span[0] : span[1]])
    fetcher.release(fetched)


def test_a_block_of_a_strided_matrix_copies_its_own_rows_alone():
    view = torch.arange(63 * 40_000, dtype=torch.float32).view(63, 40_000).t()
    grid = Grid(tuple(view.shape))
    for span in grid:
        block = rows_of(view, span)
        assert block.untyped_storage().nbytes() <= 4 * (span[1] - span[0])
        assert torch.equal(block, view.reshape(-1)[span[0] : span[1]])


def test_a_failed_read_gives_its_memory_back(tmp_path):
    (tmp_path / "weights").write_bytes(CONTENT)
    store = LocalStore(str(tmp_path))
    sources = {(0, 0): Source("file", str(tmp_path), None, store.files())}
    arena = Arena(1 << 20)
    fetcher = Fetcher(arena, lambda source: store)
    (tmp_path / "weights").write_bytes(CONTENT[:-1])
    info = TensorInfo("U8", (NBYTES,), "weights", 0, NBYTES)
    with pytest.raises(SourceChanged, match="weights"):
        fetcher.fetch([Wanted(0, 0, info, (0, NBYTES))], sources)
    lease = arena.take(1 << 20)  # all of it
    assert lease is not None
    fetcher.close()
