"""Merge state dicts in memory, on the very blocks that a streaming merge would use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distmerge.errors import DtypeMismatch
from distmerge.expressions.alignment import Inputs, align
from distmerge.expressions.asked import Answered
from distmerge.expressions.compiler import Compiler
from distmerge.expressions.compute_pool import ComputePool, one_torch_thread, usable_cores
from distmerge.expressions.evaluate import Evaluation, Place
from distmerge.expressions.model_questions import ModelQuestions
from distmerge.expressions.nodes import Expression
from distmerge.expressions.program import Program, Same
from distmerge.expressions.rounds import ReadBlock, Span
from distmerge.expressions.settle import settle


def evaluate_eagerly(root: Expression, *, seed: int = 0) -> dict[str, Tensor]:
    """The merged tensors of an expression whose leaves are all in memory.

    Results have the dtype of the first leaf that holds the key, and live on its device; the
    arithmetic is float32 (float64 where an operand is float64).

    Raises
        KeyMismatch, ShapeMismatch, DtypeMismatch, ParameterError, MethodError
    """
    inputs = align(root)
    compiler = Compiler(root, inputs)
    found = [compiler.program(key) for key in inputs.keys]
    compiler.problems.raise_any()
    programs = [program for program in found if program is not None]
    results = {p.key: _copy(p, inputs) for p in programs if isinstance(p.steps[0], Same)}
    merged = [p for p in programs if not isinstance(p.steps[0], Same)]
    pool = ComputePool(usable_cores())
    try:
        with one_torch_thread(), torch.no_grad():
            results.update(_merge(merged, inputs, seed, pool))
    finally:
        pool.close()
    return {program.key: results[program.key] for program in programs}


def _merge(
    programs: Sequence[Program], inputs: Inputs, seed: int, pool: ComputePool
) -> dict[str, Tensor]:
    reads = [_reader(inputs, program.key) for program in programs]
    questions = ModelQuestions()
    while True:
        evaluations = [_evaluation(p, inputs, seed, questions.known) for p in programs]
        firsts = settle(evaluations, reads, pool)
        if not questions.fold(e.model_partials for e in evaluations):
            break
    outs = [_empty_result(program, inputs) for program in programs]

    def fill(at: tuple[int, int]) -> None:
        i, block = at
        value = firsts.pop(i, None) if block == 0 else None
        value = evaluations[i].block(block, reads[i]) if value is None else value
        start, stop = evaluations[i].grid.span(block)
        assert value is not None
        outs[i].view(-1)[start:stop] = value

    pool.map(fill, [(i, b) for i, e in enumerate(evaluations) for b in range(len(e.grid))])
    return {program.key: out for program, out in zip(programs, outs, strict=True)}


def _first(program: Program, inputs: Inputs) -> Tensor:
    """The tensor whose dtype and device the result takes."""
    tensor = inputs.tensors[min(program.leaves)][program.key]
    assert isinstance(tensor, Tensor)
    return tensor


def _empty_result(program: Program, inputs: Inputs) -> Tensor:
    like = _first(program, inputs)
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def compute_dtype(dtypes: Sequence[str]) -> torch.dtype:
    """float64 if an operand is, else float32."""
    return torch.float64 if "F64" in dtypes else torch.float32


def _evaluation(
    program: Program, inputs: Inputs, seed: int, known: Mapping[Place, Any]
) -> Evaluation:
    first = _first(program, inputs)
    dtypes = [inputs.spec(leaf, program.key)[0] for leaf in program.leaves]
    return Evaluation(
        program,
        tuple(first.shape),
        compute_dtype=compute_dtype(dtypes),
        seed=seed,
        device=str(first.device),
        model_answers=known,
    )


def _reader(inputs: Inputs, key: str) -> ReadBlock:
    flat: dict[int, Tensor] = {}

    def read(leaf: int, span: Span) -> Tensor:
        if leaf not in flat:
            tensor = inputs.tensors[leaf][key]
            assert isinstance(tensor, Tensor)
            flat[leaf] = tensor.detach().reshape(-1)
        return flat[leaf][span[0] : span[1]]

    return read


def _copy(program: Program, inputs: Inputs) -> Tensor:
    first = _first(program, inputs)
    for leaf in program.leaves[1:]:
        other = inputs.tensors[leaf][program.key]
        assert isinstance(other, Tensor)
        if not torch.equal(first, other.to(first.device)):
            raise differing_integers(program.key, str(first.dtype), [str(x) for x in inputs.leaves])
    return first.detach().clone()


def differing_integers(key: str, dtype: str, models: Sequence[str]) -> DtypeMismatch:
    """The error for integer or boolean tensors that aren't equal in every model."""
    return DtypeMismatch(
        f"{key} is {dtype} and differs between the models: such tensors are copied, not merged.",
        f"models: {', '.join(models)}",
        fix="on_unequal: base in the recipe copies the base's",
    )


__all__ = ["Answered", "compute_dtype", "differing_integers", "evaluate_eagerly"]
