"""What the keys of a plan ask of a worker's memory, and how wide their blocks are for it."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

from distmerge.checkpoints.tensors import TensorInfo
from distmerge.checkpoints.views import View, parts_of
from distmerge.errors import MemoryBudgetError
from distmerge.expressions.program import Scales
from distmerge.plan.eight_bit import CODES
from distmerge.plan.memory import (
    FAR_GROUP,
    MemoryPlan,
    Need,
    coding_bytes,
    largest_need,
    need_of,
    plan_memory,
    useful_arena,
    with_views,
)
from distmerge.plan.work import KeyTask, WorkUnit, widened

REUSED = 8
"""Keys that use the memory which is touched for the largest of them."""


def with_memory(
    units: Sequence[WorkUnit], budget: Mapping[str, int]
) -> tuple[list[WorkUnit], MemoryPlan]:
    """Share out the memory. Blocks are wide where that takes none from the inputs."""
    wide = [widened(unit, budget["threads"]) for unit in units]
    need = _need_of_units(wide, budget["group"])
    with contextlib.suppress(MemoryBudgetError):
        memory = plan_memory(need, **budget)
        if memory.arena >= useful_arena(need, budget["group"]):
            return wide, memory
    return list(units), plan_memory(_need_of_units(units, budget["group"]), **budget)


def _need_of_units(units: Iterable[WorkUnit], group: int) -> Need:
    tasks = [task for unit in units for task in unit.tasks]
    looks = list(map(_look, tasks))
    needs = {look: _need(task) for look, task in dict(zip(looks, tasks, strict=True)).items()}
    need = largest_need(needs.values())
    if group >= FAR_GROUP:
        return need
    return replace(need, largest=worth_keeping(needs[look].largest for look in looks))


def worth_keeping(sizes: Iterable[int]) -> int:
    """Of the raw bytes of keys that are passed over more than once, the largest that `REUSED` of
    them have; zero if there is none.

    Memory that is touched for one or two keys, as large as embeddings are, costs more than reading
    these again from the page cache.
    """
    largest = heapq.nlargest(REUSED, sizes)
    return largest[-1] if len(largest) == REUSED else 0


def largest_need_of(tasks: Iterable[KeyTask]) -> Need:
    """The most that any of them asks for, field by field."""
    return largest_need(_need(task) for task in {_look(t): t for t in tasks}.values())


def _look(task: KeyTask) -> Hashable:
    """All that a task's need depends on, where its inputs are plain; tasks alike are many."""
    looks: list[Hashable] = []
    for given in task.inputs.values():
        if not isinstance(given, TensorInfo):
            return id(task)
        looks.append((given.dtype, given.stop - given.start, given.strides))
    return (id(task.program.steps), task.shape, task.block, task.dtype, *looks)


def _need(task: KeyTask) -> Need:
    given = task.inputs.values()
    infos = [part.info for one in given for part in parts_of(one)]
    itemsize = task.item_size
    raw = sum(info.stop - info.start for info in infos)
    if isinstance(task.program.steps[0], Scales):
        return Need(0, 0, 0, 0, 0)
    need = need_of(task.program, task.grid, raw, itemsize)
    views = [one for one in given if isinstance(one, View)]
    if views:
        need = with_views(need, task.grid, views, itemsize)
    if task.dtype == CODES:
        need = replace(need, coding=coding_bytes(task.shape))
    if any(info.strides is not None for info in infos) or any(view.whole for view in views):
        return replace(need, resident=raw)  # it can't be cut into runs of the file
    return need
