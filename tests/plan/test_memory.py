"""The memory plan: a sum that holds, and a refusal that says what would be enough."""

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from methods.trees import apply, programs

from distmerge.errors import MemoryBudgetError
from distmerge.methods.blocks import BLOCK_ELEMENTS, Grid
from distmerge.methods.declare import layer_merge
from distmerge.plan.memory import (
    BARE_LIMIT,
    FAR_GROUP,
    GROUP,
    SLACK,
    WINDOW,
    WINDOWS,
    MiB,
    Need,
    asked_bytes,
    bare_process,
    gathered_bytes,
    largest_need,
    need_of,
    plan_memory,
)
from distmerge.plan.needs import worth_keeping
from distmerge.plan.sizes import parse_size

GiB = 1 << 30
amounts = st.integers(0, 64 * GiB)
needs = st.builds(
    Need,
    block=st.integers(0, 256 * MiB),
    gathered=amounts,
    resident=amounts,
    largest=amounts,
    streamed=st.integers(0, 256 * MiB),
)
threads = st.integers(1, 64)


def planned(need, allowed, threads, reserved):
    """The plan with this allowance, or None where it is refused."""
    try:
        return plan_memory(need, allowed=allowed, threads=threads, reserved=reserved)
    except MemoryBudgetError:
        return None


@given(needs, st.integers(MiB, 512 * GiB), threads, st.integers(0, BARE_LIMIT))
@example(Need(0, 0, 0, 0, 0), 2 * GiB, 1, 300 * MiB)
def test_the_parts_add_up_and_keep_within_the_allowance(need, allowed, threads, reserved):
    plan = planned(need, allowed, threads, reserved)
    if plan is None:
        return
    parts = [plan.reserved, plan.blocks, plan.windows, plan.gathered, plan.arena, SLACK]
    assert plan.projected == sum(parts) <= allowed
    assert plan.reserved == reserved
    assert plan.blocks == need.block * threads
    assert plan.windows == WINDOWS * WINDOW
    assert plan.gathered == need.gathered


@given(needs, st.integers(MiB, 64 * GiB), threads, st.integers(0, BARE_LIMIT))
def test_what_a_refusal_says_would_be_enough_is_enough(need, allowed, threads, reserved):
    try:
        plan_memory(need, allowed=allowed, threads=threads, reserved=reserved)
        return
    except MemoryBudgetError as error:
        (size,) = re.fullmatch(r"--allowed-mem (\S+)", error.fix).groups()
    enough = parse_size(size)
    assert enough > allowed
    assert planned(need, enough, threads, reserved) is not None
    # And not much more than that: a tenth of it less would have been refused.
    assert planned(need, enough - 18 * MiB, threads, reserved) is None


@given(needs, threads, st.integers(0, BARE_LIMIT))
def test_the_smallest_allowance_that_is_taken_is_enough(need, threads, reserved):
    """Half of a ring buffer is free in one piece: it has to hold what is resident at once, or the
    block that is merged and the one that is read."""
    refused, taken = 0, 1 << 40
    while taken - refused > 1:
        middle = (refused + taken) // 2
        if planned(need, middle, threads, reserved) is None:
            refused = middle
        else:
            taken = middle
    plan = planned(need, taken, threads, reserved)
    assert plan.projected == taken
    assert plan.arena // 2 >= max(need.resident, 2 * need.streamed)


@given(needs, threads, st.integers(0, BARE_LIMIT), st.integers(0, GiB))
def test_more_memory_is_never_refused_and_goes_to_the_arena(need, threads, reserved, more):
    base = 200 * GiB
    plan = planned(need, base, threads, reserved)
    larger = planned(need, base + more, threads, reserved)
    if plan is None:
        return
    assert larger.arena >= plan.arena
    assert larger.arena - plan.arena <= more
    fixed = ("reserved", "blocks", "windows", "gathered")
    assert all(getattr(larger, name) == getattr(plan, name) for name in fixed)


def test_memory_beyond_use_is_left_alone():
    need = Need(10 * MiB, 0, 0, 100 * MiB, MiB)
    assert plan_memory(need, allowed=64 * GiB, threads=2, reserved=0).arena == 251 * MiB


def test_a_large_key_stays_resident_where_reading_it_again_is_dear():
    """On a disk it is streamed: three embeddings of a 7 B in bfloat16 wanted 2 GB."""
    need = Need(10 * MiB, 0, 0, 750 * MiB, 3 * MiB)
    assert plan_memory(need, allowed=64 * GiB, threads=2, reserved=0).arena == GiB
    far = plan_memory(need, allowed=64 * GiB, threads=2, reserved=0, group=FAR_GROUP)
    assert far.arena == 1876 * MiB
    whole = Need(10 * MiB, 0, 800 * MiB, 750 * MiB, 3 * MiB)
    assert plan_memory(whole, allowed=64 * GiB, threads=2, reserved=0).arena == 1602 * MiB


def test_far_inputs_are_read_in_longer_groups_where_there_is_room():
    need = Need(10 * MiB, 0, 0, 0, MiB)
    far = plan_memory(need, allowed=64 * GiB, threads=2, reserved=0, group=FAR_GROUP)
    assert (far.group, far.arena) == (FAR_GROUP, 4 * FAR_GROUP)
    near = plan_memory(need, allowed=64 * GiB, threads=2, reserved=0)
    assert (near.group, near.arena) == (GROUP, 4 * GROUP)
    tight = plan_memory(need, allowed=near.projected, threads=2, reserved=0, group=FAR_GROUP)
    assert tight.arena == near.arena


def test_a_refusal_names_the_amounts():
    need = Need(10 * MiB, 3 * GiB, 0, GiB, MiB)
    with pytest.raises(MemoryBudgetError) as caught:
        plan_memory(need, allowed=2 * GiB, threads=4, reserved=300 * MiB)
    text = str(caught.value)
    for part in (
        "2,048 MiB are allowed",
        "bare process 300 MiB",
        "blocks of 4 thread(s) 40 MiB",
        "output 24 MiB",
        "whole tensors 3,072 MiB",
        "a method that sees whole tensors needs them in memory; blocks=True frees it",
    ):
        assert part in text
    with pytest.raises(MemoryBudgetError) as caught:
        plan_memory(Need(GiB, 0, 0, 0, 0), allowed=GiB, threads=1, reserved=0)
    assert "blocks=True" not in str(caught.value)


# --- what one key needs


def one(node):
    (program,) = programs(node).values()
    return program


@layer_merge
def whole(models):
    return models[0]


@layer_merge(blocks=True)
def rows(models):
    return models[0]


def test_a_block_of_a_small_and_of_a_large_tensor():
    """3 temporaries for each of the three steps, and 6 more: linear reads two models."""
    program = one(apply("linear", [torch.ones(2)] * 2, parameters={"weight": 1.0}))
    steps = len(program.steps)
    small, large = (need_of(program, Grid(shape), 0, 4) for shape in ((10, 10), (4096, 4096)))
    assert small.block == (3 * steps + 6) * 100 * 4
    assert large.block == (3 * steps + 6) * BLOCK_ELEMENTS * 4
    assert need_of(program, Grid((4096, 4096)), 0, 8).block == 2 * large.block
    assert large.gathered == 0


def test_raw_bytes_of_a_block_and_of_a_key():
    program = one(apply("linear", [torch.ones(2)] * 2, parameters={"weight": 1.0}))
    raw = 2 * 2 * 4096 * 4096
    need = need_of(program, Grid((4096, 4096)), raw, 4)
    assert need.largest == 0, "nothing gains from keeping what is passed over once"
    assert need.streamed == raw // 64, "a block of two bfloat16 models"
    asking = one(apply("karcher", [torch.ones(2)] * 2))
    assert need_of(asking, Grid((4096, 4096)), raw, 4).largest == raw
    assert need_of(program, Grid((10, 10)), 400, 4).streamed == 400
    assert need_of(program, Grid((0, 10)), 0, 4).streamed == 0


@pytest.mark.parametrize(
    ("method", "shape", "gathers"),
    [
        (whole, (512, 512), False),
        (whole, (513, 512), True),
        (rows, (5000, 512), False),
        (rows, (2, BLOCK_ELEMENTS + 1), True),
    ],
)
def test_methods_that_see_whole_tensors_hold_them(method, shape, gathers):
    """Three for each of the two models, of 4 bytes, and two more."""
    program = one(apply(method, [torch.ones(2)] * 2))
    elements = shape[0] * shape[1]
    expected = 8 * elements * 4 if gathers else 0
    assert gathered_bytes(program, shape, 4) == expected
    assert need_of(program, Grid(shape), 0, 4).gathered == expected


def test_open_questions_hold_histograms_and_a_result():
    ties = one(apply("ties", [torch.ones(2)] * 2, torch.ones(2), parameters={"weight": 1.0}))
    assert asked_bytes(ties, Grid((512, 512)), 4) == 3 * 512 * 1024 + 4 * BLOCK_ELEMENTS
    assert asked_bytes(one(apply("median", [torch.ones(2)])), Grid((512, 512)), 4) == 0


@given(st.lists(needs, max_size=5))
def test_the_most_demanding_key_field_by_field(many):
    most = largest_need(many)
    for name in Need.__dataclass_fields__:
        assert getattr(most, name) == max((getattr(n, name) for n in many), default=0)


def test_the_bare_process_is_measured_and_bounded():
    kept = torch.ones(BARE_LIMIT // 4)  # what the caller holds besides is the caller's
    assert bare_process() == BARE_LIMIT
    del kept
    assert 50 * MiB < bare_process() <= BARE_LIMIT


def test_a_disks_keys_stay_resident_where_there_are_several_as_large():
    assert worth_keeping([]) == 0
    assert worth_keeping([5] * 7) == 0
    assert worth_keeping([5] * 8) == 5
    assert worth_keeping([400, 400, *[70] * 5, 60, *[50] * 100, 0]) == 60
