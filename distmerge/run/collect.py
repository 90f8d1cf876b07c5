"""Some keys of a lazy expression, streamed into memory by the same worker that writes shards."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distmerge.checkpoints.tensors import TensorInfo
from distmerge.expressions.alignment import TORCH_DTYPES
from distmerge.expressions.compute_pool import one_torch_thread, usable_cores
from distmerge.expressions.evaluate import Place
from distmerge.expressions.model_questions import ModelQuestions
from distmerge.expressions.nodes import Expression
from distmerge.expressions.request import MergeRequest, request_for
from distmerge.plan.plan import Plan, make_plan
from distmerge.plan.sizes import parse_size
from distmerge.plan.work import KeyTask, WorkUnit
from distmerge.run.worker import Worker, WorkerSettings


@one_torch_thread()
def collect(
    what: Expression | MergeRequest,
    keys: Collection[str] | None = None,
    *,
    seed: int = 0,
    storage_options: Mapping[str, Any] | None = None,
    allowed_mem: int | str = "2GiB",
) -> dict[str, Tensor]:
    """The merged tensors, all or those of `keys`, in the output's order and dtypes.

    `allowed_mem` bounds what the merge itself needs; the result comes on top.

    Raises
        KeyError: a key that the result doesn't have.
        DistmergeError: as for `merge`.
    """
    request = what if isinstance(what, MergeRequest) else request_for(what, seed=seed)
    request = replace(request, storage_options=storage_options or request.storage_options)
    threads = usable_cores()
    plan = make_plan(
        request,
        allowed_mem=parse_size(allowed_mem),
        threads=threads,
        keys=keys,
    )
    wanted = set(plan.weight_map) if keys is None else set(keys)
    absent = wanted - set(plan.weight_map)
    if absent:
        raise KeyError(sorted(absent)[0])
    settings = WorkerSettings(
        output="",
        digest=plan.digest,
        memory=plan.memory,
        threads=threads,
        seed=request.seed,
        storage_options=request.storage_options,
        allow_non_finite=True,
    )
    worker = Worker(settings)
    try:
        known = _ask_model(plan, worker) if plan.asks_model else {}
        found: dict[str, Tensor] = {}
        for unit in plan.units:
            tasks = tuple(t for t in unit.tasks if t.program.key in wanted)
            if tasks:
                found.update(_collect_unit(replace(unit, tasks=tasks), worker, known))
        return found
    finally:
        worker.close()


def _ask_model(plan: Plan, worker: Worker) -> dict[Place, Any]:
    questions = ModelQuestions()
    while questions.fold(k for unit in plan.units for k in worker.ask(unit, questions.known)):
        continue
    return questions.known


class _Memory:
    """A file that stays in memory: what a shard's writer writes to here."""

    def __init__(self, size: int) -> None:
        self.data = torch.empty(size, dtype=torch.uint8)
        self._filled = 0

    def write(self, data: memoryview) -> None:
        if len(data):
            piece = torch.frombuffer(data, dtype=torch.uint8)
            self.data[self._filled : self._filled + len(data)] = piece
            self._filled += len(data)

    def commit(self) -> None:
        """Nothing is published."""

    def discard(self) -> None:
        """Nothing is left behind."""


def _collect_unit(unit: WorkUnit, worker: Worker, known: Mapping[Place, Any]) -> dict[str, Tensor]:
    sizes = [_nbytes(task) for task in unit.tasks]
    memory = _Memory(sum(sizes))
    writer = worker.writer(memory, b"", len(memory.data))
    try:
        worker.run(unit, known, writer)
        writer.commit()
    except BaseException:
        writer.discard()
        raise
    tensors, start = {}, 0
    for task, size in zip(unit.tasks, sizes, strict=True):
        piece = memory.data[start : start + size].clone()
        tensors[task.program.key] = piece.view(TORCH_DTYPES[task.dtype]).view(task.shape)
        start += size
    return tensors


def _nbytes(task: KeyTask) -> int:
    return TensorInfo(task.dtype, task.shape, "", 0, 0).nbytes
