"""Which tensors of an 8-bit output are codes, and the scales that come with them.

Where a model that is merged has 8-bit weights, those are written in 8 bits again. Else matrices in
numbered layers are, but for those that are usually kept (routers, norms, embeddings).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from distmerge.checkpoints.scales import BLOCK
from distmerge.checkpoints.views import View
from distmerge.expressions.program import Program, Scales
from distmerge.methods.parameters import layer_of
from distmerge.plan.work import KeyTask

CODES = "F8_E4M3"
_KEPT = re.compile(
    r"(^|[._])(gate|router|norm\w*|\w*norm|ln\w*|emb\w*|\w*embed\w*|conv\w*|lm_head)\."
)
"""What keeps its dtype, by the name of its module; `gate_proj` and `up_gate` are other names."""


def scale_key(key: str) -> str:
    """What the scales of a weight's blocks are called."""
    return f"{key}_scale_inv"


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One scale for each block of each matrix; the last blocks may be smaller."""
    return *shape[:-2], -(-shape[-2] // BLOCK[0]), -(-shape[-1] // BLOCK[1])


def with_scales(outputs: Sequence[KeyTask]) -> list[KeyTask]:
    """The outputs in 8 bits: codes where it is due, each followed by its scales."""
    again = any(_coded(task) for task in outputs)
    return list(_with_scales(outputs, again=again))


def _with_scales(outputs: Iterable[KeyTask], *, again: bool) -> Iterator[KeyTask]:
    for task in outputs:
        if not (_coded(task) if again else _codable(task)):
            yield task
            continue
        yield replace(task, dtype=CODES, base=None)
        key = task.program.key
        program = Program(scale_key(key), (Scales(key),))
        yield KeyTask(program, scale_shape(task.shape), "F32", 0, {}, None)


def _coded(task: KeyTask) -> bool:
    """Does a model hold it in 8 bits?"""
    given = task.inputs.values()
    return len(task.shape) > 1 and any(isinstance(one, View) and one.coded for one in given)


def _codable(task: KeyTask) -> bool:
    """Would an 8-bit model hold it in 8 bits?"""
    key, shape = task.program.key, task.shape
    if task.dtype not in ("F32", "F16", "BF16", "F64") or len(shape) != 2:
        return False
    fits = all(n and n % side == 0 for n, side in zip(shape, BLOCK, strict=True))
    return fits and key.endswith(".weight") and layer_of(key) is not None and not _KEPT.search(key)
