"""Try methods on a few small numbers before the run: what they claim, what they will ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from distmerge.errors import MethodError
from distmerge.expressions.compute_pool import ComputePool, one_torch_thread
from distmerge.expressions.evaluate import Evaluation
from distmerge.expressions.model_questions import ModelQuestions
from distmerge.expressions.program import Call, Program, Read
from distmerge.expressions.rounds import Span
from distmerge.expressions.settle import settle
from distmerge.methods.blocks import Grid

Shape = tuple[int, ...]
ROWS, WIDTH = 6, 4
WIDEST = 1 << 14
"""Rows longer than this are tried at `WIDTH`."""


class _Halves(Grid):
    """A small tensor in two blocks."""

    @property
    def step(self) -> int:
        return self.elements // 2


def asks_model(
    programs: Iterable[Program], shape_of: Callable[[Program], Shape] = lambda program: ()
) -> bool:
    """Does any method ask about the whole model, so that all keys are read before any is
    written? Also tries each method once: does it take its parameters, does a user's work on blocks
    as it says?

    `shape_of` tells a key's shape: methods are tried on rows of true length.

    Raises
        MethodError: a method that says it works on blocks gives another result on them, or fails.
        ParameterError: a method can't work with its parameters.
    """
    asks = False
    tried: set[int] = set()
    for program in programs:
        new = [s for s in program.steps if isinstance(s, Call) and s.node not in tried]
        tried.update(call.node for call in new)
        for call in new:
            if call.sees(shape_of(program)) == "whole":
                # It may rely on more of its tensors' shape than can be tried here.
                asks |= call.method.generator
            else:
                asks |= _try(call, program.key, _small_shape(shape_of(program)))
    return asks


def _small_shape(shape: Shape) -> Shape:
    width = shape[-1] if len(shape) > 1 else WIDTH
    return ROWS, width if 0 < width <= WIDEST else WIDTH


def _small(leaf: int, shape: Shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(leaf)).view(-1)


@one_torch_thread()
def _evaluate(program: Program, grid: Grid) -> tuple[Tensor, bool]:
    """The program's result on random numbers; did it ask about the whole model?"""
    small = {leaf: _small(leaf, grid.shape) for leaf in program.leaves}

    def read(leaf: int, span: Span) -> Tensor:
        return small[leaf][span[0] : span[1]]

    pool, questions = ComputePool(1), ModelQuestions()
    while True:
        evaluation = Evaluation(program, grid.shape, model_answers=questions.known)
        evaluation.grid = grid
        settle([evaluation], [read], pool)
        if not questions.fold([evaluation.model_partials]):
            break
    blocks = [pool.map(lambda b: evaluation.block(b, read), [b])[0] for b in range(len(grid))]
    return torch.cat([block for block in blocks if block is not None]), bool(questions.known)


def _try(call: Call, key: str, shape: Shape) -> bool:
    """Does the method ask about the whole model?"""
    alone = _alone(call, key)
    whole, asks = _evaluate(alone, Grid(shape))
    if call.method.builtin:
        return asks
    halves, _ = _evaluate(alone, _Halves(shape))
    # torch's exp and its like differ in their last bits with the width of what they are given.
    if not torch.allclose(whole, halves, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise MethodError(
            f"{call.method.name} says that it works on blocks, and gives another result on them.",
            f"tried on {shape[0]} x {shape[1]} numbers, whole and as two halves",
            fix="@layer_merge(blocks=False), or ask about the whole tensor with 'yield'",
        )
    return asks


def _alone(call: Call, key: str) -> Program:
    """A program that does nothing but this call, on leaves."""
    count = sum(len(places) for _, places in call.inputs)
    places = iter(range(count))
    inputs = tuple((name, tuple(next(places) for _ in old)) for name, old in call.inputs)
    base = None if call.base is None else count
    reads = [Read(leaf) for leaf in range(count + (base is not None))]
    return Program(key, (*reads, replace(call, inputs=inputs, base=base)))
