"""The boundary between a unit's keys and its reads: what is in memory together, and when.

Keys are taken in groups whose raw inputs fit into the arena side by side with the group before. A
key too large for that is streamed: its blocks pass through in windows, once for every round of its
evaluation, after the parts of some that are a sample. One that needs a single round is streamed as
soon as it is larger than a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from distmerge.checkpoints.tensors import TensorInfo
from distmerge.checkpoints.views import View, fixed_bytes, parts_of
from distmerge.expressions.program import Call, Same, Scales
from distmerge.expressions.rounds import InRounds, Span
from distmerge.plan.memory import (
    ASKING,
    asked_bytes,
    gathered_bytes,
    in_one_pass,
    made_bytes,
)
from distmerge.plan.work import KeyTask
from distmerge.run.arena import ALIGN
from distmerge.run.fetch import Wanted


@dataclass(slots=True)
class Streamed:
    """A key on its way through the arena. Whoever merges the windows says how it goes on."""

    evaluation: InRounds | None
    """None where tensors are only compared and copied."""
    last_round: bool = False
    """Does this round compute the result?"""
    sampling: bool = True
    """Is a sample of use?"""
    left: bool = False
    """Has it nothing more to ask, where no result is wanted?"""


@dataclass(frozen=True, slots=True)
class Window:
    """What is read together: some tasks whole, or some blocks of one."""

    tasks: tuple[int, ...]
    blocks: range = range(0)
    """Of the only task, if it is streamed."""
    streamed: Streamed | None = None
    part: Span | None = None
    """The elements of its block that are looked at before the rounds begin, if it is no more."""


def windows(
    tasks: Sequence[KeyTask],
    arena_size: int,
    begin: Callable[[KeyTask], InRounds],
    *,
    group: int,
    only_ask: bool,
) -> Iterator[Window]:
    """The windows of a unit, in order; to be pulled one ahead of the merge.

    Every window takes at most half of the arena, so that the next one always finds room once the
    one before it is gone. A streamed key's window is at most half of that: a round has at least
    two, and the first is merged before what follows the round is asked for.

    begin: starts the evaluation of a streamed key.
    group: raw bytes that are wanted together.
    only_ask: for the pass that only asks about the whole model; keys that ask nothing are left out.
    """
    limit = arena_size // 2
    most = min(group, limit * 4 // 5)  # holes between tensors, read along, may add a quarter
    gathered: list[int] = []
    filled = 0
    for i, task in enumerate(tasks):
        if only_ask and not _asks(task):
            continue
        size = _room(task)
        large = size > (most if _passes_once(task) else limit)
        streams = large and len(task.grid) > 1 and not is_strided(task)
        if gathered and (streams or filled + size > most):
            yield Window(tuple(gathered))
            gathered, filled = [], 0
        if streams:
            yield from _rounds(i, task, min(group, limit // 2), begin)
        else:
            gathered.append(i)
            filled += size
    if gathered:
        yield Window(tuple(gathered))


def _rounds(
    i: int, task: KeyTask, most: int, begin: Callable[[KeyTask], InRounds]
) -> Iterator[Window]:
    grid = task.grid
    fixed = sum(fixed_bytes(given) for given in task.inputs.values())
    moving = max(raw_bytes(task) - fixed, 1)
    per_block = -(-moving * min(grid.step, grid.elements) // grid.elements)
    step = max(1, min((most - fixed) // per_block, len(grid) // 2))
    streamed = Streamed(None if is_copied(task) else begin(task))
    if streamed.evaluation is not None:
        for block in streamed.evaluation.sampled:
            if streamed.sampling:
                part = streamed.evaluation.sample_span(block)
                yield Window((i,), range(block, block + 1), streamed, part)
    while not streamed.last_round:
        for first in range(0, len(grid), step):
            if streamed.left:
                return
            yield Window((i,), range(first, min(first + step, len(grid))), streamed)


def wanted(tasks: Sequence[KeyTask], window: Window) -> list[Wanted]:
    """What a window needs from the files."""
    found = []
    for i in window.tasks:
        grid = tasks[i].grid
        span = (0, grid.elements)
        if window.streamed is not None:
            whole = (grid.span(window.blocks[0])[0], grid.span(window.blocks[-1])[1])
            span = window.part or whole
        for leaf, given in tasks[i].inputs.items():
            if isinstance(given, TensorInfo):
                found.append(Wanted(i, leaf, given, span))
            elif isinstance(given, View):
                found += [
                    Wanted(i, leaf, given.parts[n].info, needed, n, given.parts[n].source)
                    for n, needed in given.needs(span)
                ]
    return found


def batches(
    units: Sequence[Sequence[KeyTask]], window: Window, gathered: int
) -> Iterator[tuple[int, ...]]:
    """A window's tasks in runs that are merged together: as many as keep what their open questions
    and gathered tensors hold within bounds, at least one.

    units: the tasks of those that are merged side by side.
    gathered: bytes planned for methods that see whole tensors.
    """
    run: list[int] = []
    whole = asked = 0
    for i in window.tasks:
        more_whole = more_asked = 0
        for tasks in units:
            program, itemsize = tasks[i].program, tasks[i].item_size
            more_whole += gathered_bytes(program, tasks[i].shape, itemsize)
            more_whole += made_bytes(tasks[i].inputs.values(), itemsize)
            more_asked += asked_bytes(program, tasks[i].grid, itemsize)
        if run and (whole + more_whole > gathered or asked + more_asked > ASKING):
            yield tuple(run)
            run, whole, asked = [], 0, 0
        run.append(i)
        whole, asked = whole + more_whole, asked + more_asked
    if run:
        yield tuple(run)


def raw_bytes(task: KeyTask) -> int:
    """Bytes that a task's inputs take in the files."""
    return sum(info.stop - info.start for info in _infos(task))


def _passes_once(task: KeyTask) -> bool:
    """Would it be read once all the same if it were streamed?"""
    fixed = sum(fixed_bytes(given) for given in task.inputs.values())
    return fixed == 0 and (is_copied(task) or in_one_pass(task.program, task.shape))


def is_strided(task: KeyTask) -> bool:
    """Does it need whole tensors in memory, because the file doesn't hold them row by row, or
    because an input can only be made whole?"""
    made = any(isinstance(one, View) and one.whole for one in task.inputs.values())
    return made or any(info.strides is not None for info in _infos(task))


def is_copied(task: KeyTask) -> bool:
    """Is it compared and copied, or made with another, rather than merged?"""
    return isinstance(task.program.steps[0], Same | Scales)


def _room(task: KeyTask) -> int:
    """Bytes of the arena, what aligning each input may cost included."""
    return raw_bytes(task) + ALIGN * len(_infos(task))


def _infos(task: KeyTask) -> list[TensorInfo]:
    return [part.info for given in task.inputs.values() for part in parts_of(given)]


def _asks(task: KeyTask) -> bool:
    return any(isinstance(s, Call) and s.method.generator for s in task.program.steps)
