"""Operands of a method that sees whole tensors, put together block by block."""

from __future__ import annotations

import threading

from torch import Tensor

from distmerge.expressions.rounds import Span


class Gathering:
    """Operands of a method that sees whole tensors, put together block by block."""

    def __init__(self) -> None:
        self.operands: list[Tensor] | None = None
        self.result: Tensor | None = None
        self._lock = threading.Lock()

    def add(self, operands: list[Tensor], span: Span, elements: int) -> None:
        with self._lock:
            if self.operands is None:
                self.operands = [o.new_empty(elements) for o in operands]
        for whole, operand in zip(self.operands, operands, strict=True):
            whole[span[0] : span[1]] = operand.reshape(-1)
