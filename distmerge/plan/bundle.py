"""Several plans over the same inputs, run side by side: what they read together, in which passes.

Plans go together where their shards hold the same keys in the same order. Each keeps its own
programs, shards, digest and receipts; what they share is the reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from distmerge.checkpoints.tensors import FileInfo, TensorInfo
from distmerge.checkpoints.views import View
from distmerge.errors import MemoryBudgetError
from distmerge.expressions.program import Call, Compute, Program, Read, Same, Scales, Step, operands
from distmerge.plan.memory import (
    WINDOW,
    WINDOWS,
    MemoryPlan,
    asked_bytes,
    largest_need,
    plan_memory,
)
from distmerge.plan.needs import largest_need_of
from distmerge.plan.plan import Plan
from distmerge.plan.work import KeyTask, Source, WorkUnit, narrowed


@dataclass
class _Leaf:
    """One input as all units see it."""

    places: Mapping[int, tuple[str, str | None]]
    """By number, the checkpoints that it and its views are read from."""
    given: dict[int, object] = field(default_factory=dict)
    """By task."""


def side_by_side(units: Sequence[WorkUnit]) -> tuple[WorkUnit, list[WorkUnit]]:
    """A unit that reads, for each key, what any of these reads, each input once; and the units with
    their leaves numbered as it has them."""
    shared: list[_Leaf] = []
    numbers = [_numbers(unit, shared) for unit in units]
    renumbered = [
        narrowed(_renumbered(unit, own)) for unit, own in zip(units, numbers, strict=True)
    ]
    tasks = []
    for place, task in enumerate(renumbered[0].tasks):
        inputs = {n: one for unit in renumbered for n, one in unit.tasks[place].inputs.items()}
        tasks.append(replace(task, inputs=inputs))
    sources: dict[tuple[int, int], Source] = {}
    for unit in renumbered:
        for origin, source in unit.sources.items():
            files: dict[str, FileInfo] = {**source.files}
            if origin in sources:
                files |= sources[origin].files
            sources[origin] = replace(source, files=files)
    return replace(renumbered[0], tasks=tuple(tasks), sources=sources), renumbered


def passes(
    plans: Sequence[Plan], *, allowed: int, threads: int
) -> tuple[tuple[tuple[int, ...], MemoryPlan], ...]:
    """Which plans are run together, by number, with a worker's memory: as few passes as it allows.

    Plans that ask about the whole model, which is read once more for each round, are run with their
    like.
    """
    groups: dict[object, list[int]] = {}
    for i, plan in enumerate(plans):
        groups.setdefault(_layout(plan), []).append(i)
    found = []
    for members in groups.values():
        for count in range(1, len(members) + 1):
            runs = [tuple(members[i::count]) for i in range(count)]
            try:
                memories = [_memory([plans[i] for i in run], allowed, threads) for run in runs]
            except MemoryBudgetError:
                if count == len(members):
                    raise
                continue
            found += list(zip(runs, memories, strict=True))
            break
    return tuple(found)


def _layout(plan: Plan) -> object:
    return plan.asks_model, tuple(
        (unit.shard, tuple((t.program.key, t.shape, t.dtype, _copied(t)) for t in unit.tasks))
        for unit in plan.units
    )


def _copied(task: KeyTask) -> bool:
    return isinstance(task.program.steps[0], Same | Scales)


def _memory(plans: Sequence[Plan], allowed: int, threads: int) -> MemoryPlan:
    """What a worker needs that runs these together: the reads of all, one's blocks at a time with
    what others will want of them, and for each its windows, whole tensors and open questions."""
    if len(plans) == 1:
        return plans[0].memory
    needs, asked, kept = [], 0, 0
    for units in zip(*(plan.units for plan in plans), strict=True):
        together, own = side_by_side(units)
        needs += [largest_need_of(unit.tasks) for unit in (together, *own)]
        for number in range(len(together.tasks)):
            tasks = [unit.tasks[number] for unit in own]
            asked = max(asked, sum(asked_bytes(t.program, t.grid, 8) for t in tasks))
            kept = max(kept, kept_bytes(tasks))
    largest = largest_need(needs)
    need = replace(
        largest,
        block=largest.block + kept,
        gathered=sum(plan.memory.gathered for plan in plans),
        coding=sum(plan.memory.coding for plan in plans),
    )
    windows = (len(plans) - 1) * WINDOWS * WINDOW
    sending = sum(plan.memory.sending for plan in plans)
    reserved = max(plan.memory.reserved for plan in plans)
    return plan_memory(
        need,
        allowed=allowed,
        threads=threads,
        reserved=reserved,
        sending=sending + windows + asked,
        group=max(plan.memory.group for plan in plans),
    )


def kept_bytes(tasks: Sequence[KeyTask]) -> int:
    """What is held of a block since several programs of one key may want it: see
    `distmerge.methods.sharing`. Only programs that read the same share anything."""
    together: dict[tuple[int, ...], set[tuple[object, int]]] = {}
    for task in tasks:
        made = together.setdefault(task.program.leaves, set())
        steps: list[object] = []
        last = len(task.program.steps) - 1
        for number, step in enumerate(task.program.steps):
            left = list(_made(step, steps))
            made.update(left if number < last else left[:-1])  # a result is each program's own
    grid = tasks[0].grid
    most = max(sum(count for _, count in made) for made in together.values())
    return most * min(grid.step, grid.elements) * max(task.item_size for task in tasks)


def _made(step: Step, steps: list[object]) -> Iterator[tuple[object, int]]:
    """What a step leaves behind, and how many blocks that is; `steps` are those before it."""
    same: object = step
    if isinstance(step, Compute):
        left, right = (None if n is None else steps[n] for n in (step.left, step.right))
        same = step.operator, repr(step.number), left, right
    elif isinstance(step, Call):
        given = tuple(steps[n] for n in operands(step))
        yield ("task vectors", given), len(given)
        same = step.node, step.method.name, repr(step.parameters), given
    steps.append(same)
    yield same, 1


def _numbers(unit: WorkUnit, shared: list[_Leaf]) -> dict[int, int]:
    """The unit's leaves as numbers of the shared ones, which grow by those that are new."""
    given: dict[int, dict[int, object]] = {}
    for place, task in enumerate(unit.tasks):
        for leaf, one in task.inputs.items():
            given.setdefault(leaf, {})[place] = one
    found: dict[int, int] = {}
    for leaf, own in given.items():
        places = {n: (s.root, s.revision) for (i, n), s in unit.sources.items() if i == leaf}
        number = next(
            (
                n
                for n, other in enumerate(shared)
                if n not in found.values() and other.places == places and _agree(other.given, own)
            ),
            len(shared),
        )
        if number == len(shared):
            shared.append(_Leaf(places))
        shared[number].given.update(own)
        found[leaf] = number
    return found


def _agree(known: Mapping[int, object], own: Mapping[int, object]) -> bool:
    """Do two leaves present the same tensors, where both have one?"""
    return all(_equal(known[place], one) for place, one in own.items() if place in known)


def _equal(a: object, b: object) -> bool:
    comparable = isinstance(a, TensorInfo | View) and isinstance(b, TensorInfo | View)
    return a is b or (comparable and a == b)


def _renumbered(unit: WorkUnit, numbers: Mapping[int, int]) -> WorkUnit:
    tasks = tuple(
        replace(
            task,
            program=_program(task.program, numbers),
            inputs={numbers[leaf]: one for leaf, one in task.inputs.items()},
            base=None if task.base is None else numbers[task.base],
        )
        for task in unit.tasks
    )
    sources = {(numbers[leaf], n): source for (leaf, n), source in unit.sources.items()}
    return replace(unit, tasks=tasks, sources=sources)


def _program(program: Program, numbers: Mapping[int, int]) -> Program:
    steps = tuple(
        replace(step, leaf=numbers[step.leaf])
        if isinstance(step, Read)
        else replace(step, leaves=tuple(numbers[leaf] for leaf in step.leaves))
        if isinstance(step, Same)
        else step
        for step in program.steps
    )
    return replace(program, steps=steps)
