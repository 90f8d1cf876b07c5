"""What is in memory together: never more than the arena's half, whatever the tensors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmerge.checkpoints.tensors import TensorInfo
from distmerge.errors import MemoryBudgetError
from distmerge.expressions.evaluate import SAMPLE_FROM, Evaluation
from distmerge.expressions.program import Call, Program, Read, Same
from distmerge.methods.blocks import BLOCK_ELEMENTS, Grid, wide_block
from distmerge.methods.registry import find_method
from distmerge.plan.memory import (
    FAR_GROUP,
    GROUP,
    SLACK,
    WINDOW,
    WINDOWS,
    MiB,
    largest_need,
    need_of,
    plan_memory,
)
from distmerge.plan.work import KeyTask
from distmerge.run.arena import ALIGN
from distmerge.run.fetch import ranges
from distmerge.run.windows import Window, batches, raw_bytes, wanted, windows


def tasks_of(
    shapes: list[tuple[int, ...]], leaves: int, gap: int = 0, *, wide: bool = False
) -> list[KeyTask]:
    """bf16 tensors one after the other in a file of each leaf, with holes between."""
    tasks, at = [], 0
    steps = tuple(Read(leaf) for leaf in range(leaves))
    places = tuple(range(1, leaves))
    for i, shape in enumerate(shapes):
        nbytes = 2 * Grid(shape).elements
        info = TensorInfo("BF16", shape, "file", at, at + nbytes)
        at += nbytes + gap
        parameters: dict[str, Any] = {"weight": [1.0] * len(places), "density": [0.5] * len(places)}
        call = Call(0, find_method("ties"), (("models", places),), 0, 0, parameters)
        program = Program(f"k{i}", (*steps, call))
        inputs = dict.fromkeys(range(leaves), info)
        block = wide_block(shape, 1) if wide else BLOCK_ELEMENTS
        tasks.append(KeyTask(program, shape, "BF16", 0, inputs, 0, block))
    return tasks


shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 40)),
        st.tuples(st.integers(1, 3), st.integers(1, 2 * BLOCK_ELEMENTS + 5)),
        st.tuples(st.integers(1, 30_000), st.sampled_from([63, 64, 1000])),
        st.tuples(st.integers(1, 6000), st.just(1027)),
    ),
    min_size=1,
    max_size=20,
)


@given(
    shapes,
    st.sampled_from([2, 3, 4, 5, 40]),
    st.integers(0, 200),
    st.integers(4 * MiB, 40 * MiB),
    st.sampled_from([GROUP, FAR_GROUP]),
    st.booleans(),
)
def test_windows_hold_every_key_and_fit(shapes, leaves, gap, more, group, wide):
    tasks = tasks_of(shapes, leaves, gap, wide=wide)
    need = largest_need(need_of(t.program, t.grid, raw_bytes(t), 4) for t in tasks)
    fixed = need.block + WINDOWS * WINDOW + SLACK
    with pytest.raises(MemoryBudgetError):
        plan_memory(need, allowed=fixed, threads=1, reserved=0)
    allowed = fixed + 4 * need.streamed + 2 * need.largest + more
    arena = plan_memory(need, allowed=allowed, threads=1, reserved=0, group=group).arena
    seen: list[int] = []
    rounds: dict[int, list[range]] = {}
    sampled: dict[int, list[tuple[int, int]]] = {}
    pulled = windows(
        tasks,
        arena,
        lambda t: Evaluation(t.program, t.shape, block=t.block),
        group=group,
        only_ask=False,
    )
    for window in pulled:
        room = 0
        for leaf in range(leaves):
            spans = [want.byte_range() for want in wanted(tasks, window) if want.leaf == leaf]
            room += sum(stop - start + ALIGN for start, stop in ranges(spans))
        assert room <= arena // 2 + ALIGN * leaves
        if window.streamed is None:
            seen += window.tasks
        else:
            (i,) = window.tasks
            if window.part is not None:
                sampled.setdefault(i, []).append(window.part)
                continue
            assert i in sampled or Grid(tasks[i].shape).elements < SAMPLE_FROM
            rounds.setdefault(i, []).append(window.blocks)
            window.streamed.last_round = True
    for i, blocks in rounds.items():
        assert [b for piece in blocks for b in piece] == list(range(len(tasks[i].grid)))
        assert len(blocks) >= 2
        seen.append(i)
        grid, parts = Grid(tasks[i].shape), sampled.get(i, [])
        looked_at = sum(stop - start for start, stop in parts)
        assert looked_at == 0 or 1 / 32 <= looked_at / grid.elements <= 1 / 8
        assert all(0 <= start < stop <= grid.elements for start, stop in parts)
        assert all(a[1] <= b[0] for a, b in pairwise(parts))
    assert sorted(seen) == list(range(len(tasks)))


def test_thousands_of_scattered_scalars_do_not_fill_the_ring():
    # Each takes 64 bytes of the ring, however short it is.
    tasks = tasks_of([(1,)] * 40_000, 2, gap=4096)
    for window in windows(tasks, 4 * MiB, lambda t: None, group=GROUP, only_ask=False):  # type: ignore[arg-type,return-value]
        assert 2 * ALIGN * len(window.tasks) <= 2 * MiB


def test_a_streamed_key_is_left_when_it_has_nothing_more_to_ask():
    tasks = tasks_of([(40_000, 63), (7,)], 4)
    pulled = windows(
        tasks, 4 * MiB, lambda t: Evaluation(t.program, t.shape), group=GROUP, only_ask=True
    )
    first = next(window for window in pulled if window.part is None)
    assert first.streamed is not None
    again = next(pulled)
    assert again.streamed is first.streamed
    first.streamed.left = True
    assert next(pulled).tasks == (1,)


def test_keys_that_ask_nothing_are_left_out_of_a_pass_that_asks():
    asking, silent = tasks_of([(63,), (7,)], 3)
    copied = Program("ids", (Same((0, 1)),))
    quiet = KeyTask(copied, silent.shape, "BF16", 0, silent.inputs, None)
    found = list(windows([quiet, asking], 4 * MiB, lambda t: None, group=GROUP, only_ask=True))  # type: ignore[arg-type,return-value]
    assert [window.tasks for window in found] == [(1,)]


def test_batches_keep_open_questions_and_gathered_tensors_within_bounds():
    tasks = tasks_of([(63,)] * 100, 5)
    runs = list(batches([tasks], Window(tuple(range(100))), gathered=0))
    assert [i for run in runs for i in run] == list(range(100))
    assert max(map(len, runs)) * 5 * 512 * 1024 <= 16 * MiB
    assert min(map(len, runs[:-1])) > 1
