"""From a request and headers to work units, memory and a digest; nothing is read but headers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distmerge.checkpoints.safetensors_header import encode_header
from distmerge.checkpoints.tensors import FLOAT_DTYPES, Checkpoint, TensorInfo
from distmerge.checkpoints.views import parts_of
from distmerge.errors import DtypeMismatch, RecipeError
from distmerge.expressions.alignment import Inputs, Skipped, align, spec_of
from distmerge.expressions.compiler import Compiler
from distmerge.expressions.nodes import Leaf
from distmerge.expressions.program import Program, Same
from distmerge.expressions.request import MergeRequest
from distmerge.plan import describe
from distmerge.plan.beside import with_beside
from distmerge.plan.coverage import account
from distmerge.plan.digest import digest_of, kernel_class
from distmerge.plan.eight_bit import CODES, with_scales
from distmerge.plan.idle import with_idle
from distmerge.plan.memory import FAR_GROUP, GROUP, MemoryPlan, bare_process
from distmerge.plan.needs import with_memory
from distmerge.plan.padding import filled
from distmerge.plan.probe import asks_model
from distmerge.plan.shards import default_shard_size, partition, together
from distmerge.plan.work import KeyTask, Origin, Source, WorkUnit
from distmerge.write.index import shard_names
from distmerge.write.shard import STAGING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first tensor is read."""

    request: MergeRequest
    inputs: Inputs
    units: tuple[WorkUnit, ...]
    digest: str
    kernel: str
    memory: MemoryPlan
    skipped: tuple[Skipped, ...]
    """Every input tensor that goes nowhere, with the reason."""
    asks_model: bool
    """Does a method ask about the whole model, so that all keys are read before any is
    written?"""
    workers: int
    device: str

    @property
    def expression(self) -> str:
        return str(self.request.root)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Every model that something is read from, adapters too."""
        named = [leaf for leaf in self.inputs.leaves if isinstance(leaf, Leaf)]
        named += [leaf for leaf in (self.request.donor, self.request.config_from) if leaf]
        return [c for leaf in named for c in (leaf.checkpoint, *leaf.checkpoint.others)]

    def tables(self) -> list[Table]:
        """For people: see `distmerge.plan.describe`."""
        return describe.tables(self)

    def to_json(self) -> dict[str, Any]:
        """For programs: see `distmerge.plan.describe`."""
        return describe.to_json(self)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Key -> shard, in the order of the output."""
        return {task.program.key: unit.shard for unit in self.units for task in unit.tasks}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """Key -> dtype written."""
        return {task.program.key: task.dtype for unit in self.units for task in unit.tasks}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Key -> bytes written."""
        return {
            task.program.key: TensorInfo(task.dtype, task.shape, "", 0, 0).nbytes
            for unit in self.units
            for task in unit.tasks
        }

    @cached_property
    def shard_sizes(self) -> list[int]:
        """Bytes of the tensors in each shard."""
        return [unit.size - len(unit.header) for unit in self.units]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(self.shard_sizes)

    @cached_property
    def bytes_in(self) -> int:
        return sum(u.bytes_in for u in self.units)


def make_plan(
    request: MergeRequest,
    *,
    allowed_mem: int,
    reserved: int | None = None,
    besides: int = 0,
    sending: int = 0,
    workers: int = 1,
    threads: int = 1,
    max_shard_size: int | None = None,
    device: str = "cpu",
    keys: Collection[str] | None = None,
) -> Plan:
    """Plan a merge, or as much of it as `keys` needs.

    allowed_mem, reserved: bytes of one worker process, and those that it takes before it merges:
    what this one does and `besides`, if None. sending: what the output's store holds of a shard.
    workers is recorded, threads are those of each process.

    Raises
        KeyMismatch, ShapeMismatch, DtypeMismatch, ParameterError, MemoryBudgetError
    """
    inputs = align(request.root, request.donor)
    compiler = _compiler(request, inputs)
    programs = _programs(compiler, inputs.keys if keys is None else keys)
    asks = asks_model(programs, lambda p: inputs.spec(min(p.leaves), p.key)[1])
    if asks and keys is not None:
        programs = _programs(compiler, inputs.keys)
    if not programs:
        raise RecipeError(
            "Nothing would be written: the models share no key.", fix="check the models"
        )
    donors = [i for i, leaf in enumerate(inputs.leaves) if leaf == request.donor]
    eight = request.out_dtype == CODES
    asked = None if eight else request.out_dtype
    outputs = [_output(program, inputs, asked, donors) for program in programs]
    outputs = with_scales(outputs) if eight else outputs
    units, headers = _units(outputs, inputs, max_shard_size)
    kernel, donor = kernel_class(device), request.files_from
    digest = digest_of(request.root, request.seed, headers, kernel, request.tokenizer, donor)
    if len(units) == 1:
        units = [replace(units[0], path=f"{STAGING}/{digest}/{units[0].shard}")]
    if reserved is None:  # now that methods, kernels and the plan itself are in memory
        reserved = bare_process() + besides
    group = FAR_GROUP if any(unit.is_far for unit in units) else GROUP
    budget = {"allowed": allowed_mem, "threads": threads, "reserved": reserved}
    budget |= {"sending": sending, "group": group}
    units, memory = with_memory(units, budget)
    return Plan(
        request=request if keys is not None else with_idle(with_beside(request), compiler),
        inputs=inputs,
        units=tuple(units),
        digest=digest,
        kernel=kernel,
        memory=memory,
        skipped=account(inputs, programs, whole=keys is None),
        asks_model=asks,
        workers=workers,
        device=device,
    )


def _compiler(request: MergeRequest, inputs: Inputs) -> Compiler:
    return Compiler(
        request.root,
        inputs,
        on_unequal=request.on_unequal,
        on_shape_mismatch=request.on_shape_mismatch,
    )


def _programs(compiler: Compiler, keys: Iterable[str]) -> list[Program]:
    found = [compiler.program(key) for key in keys]
    compiler.problems.raise_any()
    return [program for program in found if program is not None]


def _output(
    program: Program, inputs: Inputs, out_dtype: str | None, donors: Sequence[int]
) -> KeyTask:
    """donors: the donor's places among the leaves, where it is one."""
    key = program.key
    leaves = program.leaves
    donor = next((i for i in donors if i in leaves), None)
    first = min(leaves) if donor is None else donor
    program, given = filled(program, {leaf: inputs.tensors[leaf][key] for leaf in leaves})
    own, shape = spec_of(given[first])
    if not isinstance(program.steps[0], Same):
        _check_floats(key, {spec_of(one)[0] for one in given.values()})
        own = out_dtype or own
    return KeyTask(
        program=program,
        shape=shape,
        dtype=own,
        offset=0,
        inputs=given,
        base=donor if len(leaves) > 1 else None,
    )


def _check_floats(key: str, dtypes: set[str]) -> None:
    other = sorted(dtypes - FLOAT_DTYPES)
    if other:
        raise DtypeMismatch(
            f"{key} is {', '.join(sorted(dtypes))}: these can't be merged with one another.",
            fix="save the models in one kind of dtype, or leave this key out",
        )
    eight = sorted(d for d in dtypes if d.startswith("F8"))
    if eight:
        raise DtypeMismatch(
            f"{key} is {eight[0]}, and its scale isn't in the model, or isn't understood.",
            f"looked for {key}_scale_inv and {key}_scale, one for all, for each row or each block",
            fix="convert the model to bfloat16 first",
        )


def _units(
    tasks: Sequence[KeyTask], inputs: Inputs, max_shard_size: int | None
) -> tuple[list[WorkUnit], list[bytes]]:
    groups = together(tasks)
    sizes = [sum(TensorInfo(t.dtype, t.shape, "", 0, 0).nbytes for t in g) for g in groups]
    runs = partition(sizes, max_shard_size or default_shard_size(sum(sizes)))
    units, headers = [], []
    for i, (name, run) in enumerate(zip(shard_names(len(runs)), runs, strict=True)):
        members = [task for j in run for task in groups[j]]
        specs = [(t.program.key, t.dtype, t.shape) for t in members]
        header, places = encode_header(specs, {"format": "pt"})
        placed = tuple(replace(t, offset=places[t.program.key][0]) for t in members)
        units.append(WorkUnit(i, name, name, header, placed, _sources(placed, inputs)))
        headers.append(header)
    return units, headers


def _sources(tasks: Sequence[KeyTask], inputs: Inputs) -> dict[Origin, Source]:
    found: dict[Origin, dict[str, None]] = {}
    for task in tasks:
        for leaf, given in task.inputs.items():
            if isinstance(given, TensorInfo):  # there may be a hundred thousand: no `Part` for each
                found.setdefault((leaf, 0), {})[given.file] = None
                continue
            for part in parts_of(given):
                found.setdefault((leaf, part.source), {})[part.info.file] = None
    sources = {}
    for origin, names in found.items():
        held, name = _checkpoint(inputs, *origin), str(inputs.leaves[origin[0]])
        files = {file: held.files[file] for file in names}
        sources[origin] = Source(name, held.root, held.revision, files, held.spool)
    return sources


def _checkpoint(inputs: Inputs, leaf: int, source: int) -> Checkpoint:
    node = inputs.leaves[leaf]
    assert isinstance(node, Leaf)
    return node.checkpoint.source(source)
