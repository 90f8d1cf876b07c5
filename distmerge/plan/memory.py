"""How much memory a worker will use: additions, made before anything is read.

    projected = reserved        the bare process: interpreter, torch, headers
              + blocks          temporaries of the blocks in flight, one per thread
              + windows         output on its way to the writer
              + gathered        whole-tensor operands of methods that see no blocks
              + sending         what the output's store holds of a shard on its way out
              + arena           raw inputs, in the files' dtypes

The arena takes what the budget leaves, up to a ceiling beyond which more doesn't help; all else is
fixed by the plan. It lives in the worker as one ring buffer, so the bound holds by construction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import psutil

from distmerge.checkpoints.views import View
from distmerge.errors import MemoryBudgetError
from distmerge.expressions.program import Call, Program
from distmerge.methods.blocks import Grid
from distmerge.methods.fusion import fused_loops

MiB = 1 << 20
RAY = 64 * MiB
"""What Ray's own part of a worker takes."""
BARE_LIMIT = 640 * MiB
"""At most this much of what the process held before the merge counts against the merge: models
that the caller keeps in memory are the caller's."""
SLACK = 64 * MiB
"""Open questions, what was drawn (`methods.random.REMEMBERED`), allocator fragmentation, client
buffers, Python objects of a unit."""
WINDOW = 8 * MiB
"""Output bytes that are merged together before they go to the writer."""
WINDOWS = 3
"""That threads fill, that wait and that are written, together."""
GROUP = 32 * MiB
"""Raw bytes that are read together: long enough for long requests, small enough to overlap."""
FAR_GROUP = 64 * MiB
"""The same where an input is behind a network: each group waits once for an answer to come."""
NEAR_ARENA = 1024 * MiB
"""A key that would need more of the arena to stay resident is streamed from a disk, and read again
in each round: the page cache has most of it. From behind a network it stays, if there is room."""

CODING = 1 << 21
"""Values that are coded together."""
VIEW_COPIES = 4
"""Blocks that an input holds for a moment as it is made: its parts, their product, the result."""
HISTOGRAM = 512 * 1024
"""Bytes of the largest partial answer."""
ASKING = 16 * MiB
"""Bytes of keys whose questions are open at the same time: part of the slack."""


@dataclass(frozen=True, slots=True)
class Need:
    """What the most demanding key of a plan asks for, in bytes."""

    block: int
    """Temporaries of one block in one thread."""
    gathered: int
    """Whole-tensor operands, result and temporaries."""
    resident: int
    """Raw inputs of the key that must be resident at once (strided views, whole-tensor methods
    are not among them)."""
    largest: int
    """Raw inputs of the largest key that is passed over more than once: kept resident where the
    arena has room."""
    streamed: int
    """Raw inputs of one block."""
    coding: int = 0
    """Values that wait to be written in 8 bits, and their codes."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """One worker's memory, in bytes."""

    allowed: int
    reserved: int
    blocks: int
    windows: int
    gathered: int
    arena: int
    least: int
    """The smallest arena that will do."""
    sending: int = 0
    """Parts of a shard on their way to the output's store."""
    coding: int = 0
    """What waits to be written in 8 bits."""
    group: int = GROUP
    """Raw inputs that are read together, where the arena has room for four times as much."""

    @property
    def projected(self) -> int:
        fixed = self.reserved + SLACK + self.blocks + self.windows + self.gathered
        return fixed + self.coding + self.sending + self.arena


def bare_process() -> int:
    """Bytes that this process holds now, as far as they are the merge's own, once everything
    that a merge calls is loaded."""
    fused_loops()
    return int(min(psutil.Process().memory_info().rss, BARE_LIMIT))


def need_of(program: Program, grid: Grid, raw: int, itemsize: int) -> Need:
    """What one key asks for. `raw` is the bytes of its inputs as they lie in the files, `itemsize`
    the bytes of an element in the arithmetic."""
    block = min(grid.step, max(grid.elements, 1)) * itemsize
    operands = max(len(program.steps), 1)
    share = raw * min(grid.step, grid.elements) // max(grid.elements, 1)
    gathered = gathered_bytes(program, grid.shape, itemsize)
    again = 0 if in_one_pass(program, grid.shape) else raw
    return Need((3 * operands + 6) * block, gathered, 0, again, share)


def in_one_pass(program: Program, shape: tuple[int, ...]) -> bool:
    """Has every block a result when it is first seen? Such keys gain nothing from being resident
    as a whole."""
    grid = Grid(shape)
    return not any(
        step.method.generator or not grid.streams(step.sees(shape))
        for step in program.steps
        if isinstance(step, Call)
    )


def with_views(need: Need, grid: Grid, views: Sequence[View], itemsize: int) -> Need:
    """What a key asks for whose inputs are made as they are read: copies of each block and of what
    every block needs; all of an input that must be made at once."""
    rows = grid.step if grid.whole_rows else max(grid.row, grid.step)
    block = VIEW_COPIES * min(rows, max(grid.elements, 1)) * itemsize
    fixed = sum(view.fixed for view in views)
    return Need(
        need.block + len(views) * block + itemsize * fixed,
        need.gathered + made_bytes(views, itemsize),
        need.resident,
        need.largest,
        need.streamed + fixed,
    )


def coding_bytes(shape: tuple[int, ...]) -> int:
    """What coding a tensor holds: a batch of values and 128 rows, twice, and their codes."""
    return 3 * 4 * (CODING + 128 * shape[-1])


def made_bytes(given: Iterable[object], itemsize: int) -> int:
    """What inputs hold that must be made whole: themselves, their parts, temporaries."""
    made = [one for one in given if isinstance(one, View) and one.whole]
    return sum(VIEW_COPIES * view.elements * itemsize for view in made)


def gathered_bytes(program: Program, shape: tuple[int, ...], itemsize: int) -> int:
    """What methods that see no blocks hold at once: operands, the method's own stack of them, a
    mask's worth of temporaries, the result."""
    grid = Grid(shape)
    calls = [step for step in program.steps if isinstance(step, Call)]
    whole = [call for call in calls if not grid.streams(call.sees(shape))]
    return sum((3 * _operands(call) + 2) * grid.elements * itemsize for call in whole)


def asked_bytes(program: Program, grid: Grid, itemsize: int) -> int:
    """What a key holds while its methods' questions are open: a histogram for each model, and its
    first block's result, if it took that to show that none is open any more."""
    calls = [step for step in program.steps if isinstance(step, Call) and step.method.generator]
    result = min(grid.step, grid.elements) * itemsize
    return sum(_operands(call) * HISTOGRAM for call in calls) + result if calls else 0


def _operands(call: Call) -> int:
    return sum(len(members) for _, members in call.inputs) + (call.base is not None)


def largest_need(needs: Iterable[Need]) -> Need:
    """Field by field, the most that any key asks for."""
    block = gathered = resident = largest = streamed = coding = 0
    for need in needs:
        block, gathered = max(block, need.block), max(gathered, need.gathered)
        resident, largest = max(resident, need.resident), max(largest, need.largest)
        streamed, coding = max(streamed, need.streamed), max(coding, need.coding)
    return Need(block, gathered, resident, largest, streamed, coding)


def plan_memory(
    need: Need,
    *,
    allowed: int,
    threads: int,
    reserved: int,
    sending: int = 0,
    group: int = GROUP,
) -> MemoryPlan:
    """Share out a worker's budget.

    Raises
        MemoryBudgetError: with what would be enough.
    """
    blocks, windows = need.block * threads, WINDOWS * WINDOW
    fixed = reserved + SLACK + blocks + windows + need.gathered + need.coding + sending
    least = _least_arena(need)
    if fixed + least > allowed:
        raise MemoryBudgetError(
            f"A worker would need {_mib(fixed + least)}, and {_mib(allowed)} are allowed.",
            f"bare process {_mib(reserved)}, blocks of {threads} thread(s) {_mib(blocks)}, "
            f"output {_mib(windows + sending)}, whole tensors {_mib(need.gathered)}, "
            f"inputs {_mib(least)}",
            *(
                ["a method that sees whole tensors needs them in memory; blocks=True frees it"]
                if need.gathered
                else []
            ),
            fix=f"--allowed-mem {-(-(fixed + least) // MiB) + 16}MiB",
        )
    arena = min(useful_arena(need, group), allowed - fixed)
    return MemoryPlan(
        allowed, reserved, blocks, windows, need.gathered, arena, least, sending, need.coding, group
    )


def useful_arena(need: Need, group: int) -> int:
    """Bytes of inputs beyond which more doesn't help."""
    resident = need.largest * 5 // 2 + MiB
    if group < FAR_GROUP:
        resident = min(resident, NEAR_ARENA)
    return max(4 * group, resident, _least_arena(need))


def _least_arena(need: Need) -> int:
    # A ring buffer always has room for half its size, wherever its head stands; inputs are
    # aligned in it, and holes between them may add a quarter.
    return 2 * (max(need.resident, 2 * need.streamed) + MiB)


def fitted(plan: MemoryPlan, reserved: int) -> MemoryPlan:
    """The plan of a worker that held this much before it merged: what is allowed and wasn't
    planned, and then its arena, make up for what is more.

    Raises
        MemoryBudgetError: they can't.
    """
    more = max(0, reserved - plan.reserved)
    arena = plan.arena - max(0, more - (plan.allowed - plan.projected))
    if arena < plan.least:
        enough = plan.allowed + plan.least - arena
        raise MemoryBudgetError(
            f"A worker holds {_mib(reserved)} before it merges, and {_mib(plan.reserved)} "
            "were planned.",
            fix=f"--allowed-mem {-(-enough // MiB) + 16}MiB",
        )
    return replace(plan, reserved=plan.reserved + more, arena=arena)


def _mib(nbytes: int) -> str:
    return f"{nbytes / MiB:,.0f} MiB"
