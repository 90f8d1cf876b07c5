"""What a method makes of its operands first, in the dtype that the file holds them in.

A method that is declared `raw` gets bfloat16 as it was read and goes through these functions, which
compute in float32 whatever they are given: what they return is the same as if every operand had
been widened before.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmerge.methods.blocks import CHUNK
from distmerge.methods.difference import Difference, Operand, Spread, Thinned, computed
from distmerge.methods.fusion import flat, flat_tensor, fused_for, fused_loops
from distmerge.methods.sharing import is_shared, once

Bits = np.ndarray[Any, Any]


def reads_raw(x: Tensor) -> bool:
    """Can the fused loops work on what was read as it is?"""
    return x.dtype == torch.bfloat16 and x.is_cpu and fused_loops() is not None


def raw_loops(*xs: Tensor) -> ModuleType | None:
    """The loops that read bfloat16, if all of these are."""
    if not all(map(reads_raw, xs)):
        return None
    from distmerge.methods import raw_kernels

    return raw_kernels


def loops_for(*xs: Operand) -> ModuleType | None:
    """The loops that take operands as they are, if they can take all of these."""
    fits = all(fused_for(x) or (isinstance(x, Tensor) and reads_raw(x)) for x in xs)
    return fused_loops() if fits else None


def bits(x: Tensor) -> Bits:
    """The bits of bfloat16, in row-major order."""
    return flat_tensor(x).view(torch.uint16).numpy()


def widened(x: Tensor) -> Tensor:
    """What arithmetic is done on: float32, or wider where it was read so."""
    return x.float() if x.dtype == torch.bfloat16 else x


def differences(models: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    """The task vectors, models minus base; not to be written to: in a shared block others work on
    them as well."""
    return list(once("differences", [base, *models], lambda: _differences(models, base)))


def _differences(models: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    loops = raw_loops(base, *models)
    if loops is None:
        base = widened(base)
        out = base.new_empty((len(models), *base.shape))
        for row, model in zip(out, models, strict=True):
            torch.sub(widened(model), base, out=row)
    else:
        out = torch.empty((len(models), *base.shape))
        before = bits(base)
        for row, model in zip(out, models, strict=True):
            loops.difference(bits(model), before, flat(row))
    return list(out)


def task_vectors(models: Sequence[Tensor], base: Tensor) -> Sequence[Operand]:
    """`differences`, left to the loops that use them where these can read the operands."""
    if raw_loops(base, *models) is None and (fused_for(base, *models) is None or is_shared()):
        return differences(models, base)
    return [Difference(model, base) for model in models]


def elements(x: Operand) -> Any:
    """What a loop takes as an operand: see `distmerge.methods.chunks`."""
    if isinstance(x, Difference):
        return _as_it_lies(x.model), _as_it_lies(x.base)
    if isinstance(x, Thinned):
        return *elements(x.delta), x.bits, x.first
    if isinstance(x, Spread):
        return x.rows, np.empty((3, CHUNK), np.float32)
    return _as_it_lies(x)


def made(x: Thinned | Spread) -> Tensor:
    """What it stands for."""
    loops, out = fused_loops(), torch.empty(x.shape)
    assert loops is not None, "where there are none, nothing is left to them"
    loops.compute(elements(x), flat(out))
    return out


def _as_it_lies(x: Tensor) -> Bits:
    return bits(x) if x.dtype == torch.bfloat16 else flat(x)


def rows(xs: Sequence[Operand]) -> tuple[Any, list[Bits]]:
    """What a loop takes as rows; and what must be kept until it has returned, as it is given no
    more than addresses."""
    deltas = [x.delta if isinstance(x, Thinned) else x for x in xs]
    first = deltas[0]
    if not isinstance(first, Difference) or not all(
        isinstance(x, Difference) and x.base is first.base for x in deltas
    ):
        flats = [flat(computed(x)) for x in xs]
        return (addresses(flats), flats[0]), flats
    held = [_as_it_lies(x.model) for x in deltas if isinstance(x, Difference)]
    operand = addresses(held), held[0], _as_it_lies(first.base)
    if not any(isinstance(x, Thinned) for x in xs):
        return operand, held
    marked = [(x.bits, x.first) if isinstance(x, Thinned) else (None, 0) for x in xs]
    marks = np.array([0 if one is None else one.ctypes.data for one, _ in marked], np.uint64)
    bits = [one for one, _ in marked if one is not None]
    firsts = np.array([place for _, place in marked], np.int64)
    return (*operand, marks, firsts, bits[0]), [*held, *bits]


def addresses(held: Sequence[Bits]) -> Bits:
    """Where arrays begin in memory."""
    return np.array([one.ctypes.data for one in held], np.uint64)
