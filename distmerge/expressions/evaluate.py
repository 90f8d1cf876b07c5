"""Evaluate one key's program, block by block and round by round.

A round passes once over the key's blocks. In each block every step whose operands are known is
computed; a method that yields questions is replayed with the answers it has so far, and what
it asks next is folded over the blocks. When a round ends the questions are finished, and once no
question is open every block has a result. Most programs need one round, TIES two or three.

The same code serves eager merges, the in-process engine and the workers on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distmerge.errors import DistmergeError, MethodError
from distmerge.expressions.contract import checked, version_of
from distmerge.expressions.dialogue import UNKNOWN, Dialogue, Place
from distmerge.expressions.gathering import Gathering
from distmerge.expressions.program import Call, Compute, Program, Read, operands, sharing_key
from distmerge.expressions.rounds import PEEK, SAMPLE, Begun, ReadBlock, Span
from distmerge.methods.blocks import BLOCK_ELEMENTS, grid_of
from distmerge.methods.operands import reads_raw
from distmerge.methods.random import REMEMBERED, Draw, Remembered
from distmerge.methods.reductions import Question
from distmerge.methods.sharing import once
from distmerge.methods.unrounded import allow_unrounded, unrounded_allowed

__all__ = ["Evaluation", "Place"]

PEEKED = 64
"""Elements that show whether a method asks."""
SAMPLE_FROM = 1 << 20
"""Elements from which looking at a sample first saves more than it costs."""
SAMPLED = 16
"""One in so many elements is looked at."""
APART = 4
"""They are taken from one in so many blocks, at least from so many: each call has its costs."""


class Evaluation:
    """One key's program under way. `block` may be called from several threads."""

    def __init__(
        self,
        program: Program,
        shape: tuple[int, ...],
        *,
        block: int = BLOCK_ELEMENTS,
        compute_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        device: str = "cpu",
        model_answers: Mapping[Place, Any] | None = None,
        remembered: int = REMEMBERED,
    ) -> None:
        """block: elements of a full block; wider ones than others have for seamless programs only.
        model_answers: answers, `Answered`, or states, to questions about the whole model.
        remembered: bytes of what was drawn that rounds may hand on to the next."""
        self.program = program
        self.grid = grid_of(shape, block)
        self.compute_dtype = compute_dtype
        self.seed = seed
        self.device = torch.device(device)
        calls = {i: s for i, s in enumerate(program.steps) if isinstance(s, Call)}
        self._remembered = Remembered(remembered)
        self._gatherings = {i: Gathering() for i, s in calls.items() if self._gathers(s)}
        raw = self.device.type == "cpu" and compute_dtype == torch.float32
        self._raw = program.raw_reads(self._gatherings) if raw else frozenset()
        self._dialogues = {
            i: Dialogue(
                s,
                s.key or program.key,
                seed,
                model_answers or {},
                1 if i in self._gatherings else len(self.grid),
                max(self.grid.elements, 1) if i in self._gatherings else grid_of(shape).step,
            )
            for i, s in calls.items()
            if s.method.generator
        }

    @property
    def direct(self) -> bool:
        """Does every block have a result in the first round?"""
        return not self._dialogues and not self._gatherings

    @property
    def model_partials(self) -> dict[Place, tuple[Question, Any]]:
        """What this key has to say to open questions about the whole model."""
        return {k: v for d in self._dialogues.values() for k, v in d.model_partials.items()}

    def break_off(self) -> None:
        """It has failed: nobody is to wait for its answers."""
        for dialogue in self._dialogues.values():
            dialogue.broken_off = True

    def _gathers(self, step: Call) -> bool:
        """Must this method see the whole tensor although it has several blocks?"""
        return not self.grid.streams(step.sees(self.grid.shape))

    def block(self, index: int, read: ReadBlock) -> Any:
        """The result for block `index`: a flat tensor, or `Unrounded` where that is allowed; None
        if it needs answers not known yet.

        Raises
            MethodError: a method raised or broke its contract.
        """
        result = self._run(index, self.grid.span(index), read)
        if isinstance(result, Tensor):
            return result.reshape(-1)
        return None if result is UNKNOWN else result

    def begin_round(self, read: ReadBlock) -> Begun:
        """Find out whether this round asks: by a look at a few elements, so that no thread waits
        for a whole block, where a method of ours has no need of more."""
        rest = range(len(self.grid))
        if self._peeks and len(rest) > 1:
            span = 0, min(self._peeked, self.grid.span(0)[1])
            asks = self._run(PEEK, span, read) is UNKNOWN
            return Begun(settled=not asks, ask=rest if asks else range(0))
        value = self.block(0, read)
        return Begun(value is not None, value, rest[1:] if value is None else range(0))

    @property
    def _calls(self) -> list[Call]:
        return [step for step in self.program.steps if isinstance(step, Call)]

    @property
    def _peeks(self) -> bool:
        return not self._gatherings and all(step.method.builtin for step in self._calls)

    @property
    def _peeked(self) -> int:
        """So many elements, or a row of them where any method sees rows."""
        rows = any(step.sees(self.grid.shape) == "rows" for step in self._calls)
        return self.grid.row if rows else PEEKED

    @property
    def follows(self) -> bool:
        """Is all that it asks in this round asked by other programs of the same blocks as well,
        which look at them? To be asked once a block has been looked at."""
        if self._gatherings or not any(d.follows for d in self._dialogues.values()):
            return False
        return all(d.follows or not d.asking for d in self._dialogues.values())

    @property
    def sampled(self) -> range:
        """The blocks of which a part is worth looking at first; none where that saves nothing."""
        shape, count, asking = self.grid.shape, len(self.grid), list(self._dialogues.values())
        pays = len(asking) == 1 and self.grid.elements >= SAMPLE_FROM and not self._gatherings
        if not pays or asking[0].step.sees(shape) != "elements":
            return range(0)
        return range(0, count, max(1, min(APART, count // APART)))

    def sample(self, index: int, read: ReadBlock) -> bool:
        """Let the first questions look at a part of block `index`, one of `sampled`. Had any of
        them use of it?"""
        self._run(SAMPLE, self.sample_span(index), read)
        return any(d.sampled for d in self._dialogues.values())

    def sample_span(self, index: int) -> Span:
        """That part."""
        start, stop = self.grid.span(index)
        return start, start + max(1, (stop - start) * self.sampled.step // SAMPLED)

    def use_sample(self) -> None:
        """Begin with what the sample said."""
        for dialogue in self._dialogues.values():
            dialogue.use_sample()

    def _run(self, index: int, span: Span, read: ReadBlock) -> Any:
        values: list[Any] = []
        for place, step in enumerate(self.program.steps):
            if isinstance(step, Read):
                found = once(("read", step.leaf, span), (), partial(read, step.leaf, span))
                if place not in self._raw or not reads_raw(found):
                    found = self._widened(found)
                values.append(found)
            elif isinstance(step, Compute | Call):
                values.append(self._step(place, step, index, span, values))
        return values[-1]

    def _widened(self, found: Tensor) -> Tensor:
        device, dtype = self.device, self.compute_dtype
        return once(("widened", device, dtype), [found], lambda: found.to(device, dtype))

    def _step(
        self, place: int, step: Compute | Call, index: int, span: Span, values: list[Any]
    ) -> Any:
        """What a step makes of those before it; `UNKNOWN` if it needs answers not known yet."""
        found = [values[i] for i in operands(step)]
        if any(value is UNKNOWN for value in found):
            return UNKNOWN
        make: Callable[[], Any]
        if isinstance(step, Compute):
            make = partial(step.value, values)
        else:
            make = partial(self._call, place, step, index, span, found)
        if place == len(self.program.steps) - 1:
            return make()  # each program's own
        return once(sharing_key(step, self.seed, self.program.key), found, make, unless=UNKNOWN)

    def _call(self, place: int, step: Call, index: int, span: Span, found: list[Tensor]) -> Any:
        gathering = self._gatherings.get(place)
        if gathering is None:
            shape = self.grid.view(span, step.sees(self.grid.shape))
            tensors = [x if x.shape == shape else x.view(shape) for x in found]
            if not step.method.builtin:
                # That it writes to its inputs is found out afterwards: not to the caller's own.
                tensors = [tensor.clone() for tensor in tensors]
            return self._apply(step, self._dialogues.get(place), index, span[0], tensors)
        if gathering.result is None:
            gathering.add(found, span, self.grid.elements)
            return UNKNOWN
        return gathering.result[span[0] : span[1]]

    def _apply(
        self, step: Call, dialogue: Dialogue | None, index: int, start: int, tensors: list[Tensor]
    ) -> Any:
        """A method's result on one block, or `UNKNOWN`."""
        # Ours don't write to their inputs: see `test_inputs_are_left_alone`.
        watched = [] if step.method.builtin else tensors
        versions = [version_of(tensor) for tensor in watched]
        try:
            # What another step goes on with, or a function of somebody's own, are tensors.
            last = step is self.program.steps[-1] and step.method.builtin
            with allow_unrounded(last and unrounded_allowed()):
                outcome = self._invoke(step, index, start, tensors)
                if isinstance(outcome, Generator):
                    assert dialogue is not None
                    outcome = dialogue.replay(outcome, index, start)
        except DistmergeError:
            raise
        except (Exception, SystemExit) as error:  # sys.exit() is no way to end a merge
            raise MethodError(
                f"{step.method.name} failed on {self.program.key}: {type(error).__name__}: {error}",
                fix=f"try it on one tensor: {step.method.name}.function(...)",
            ) from error
        if [version_of(tensor) for tensor in watched] != versions:
            raise MethodError(
                f"{step.method.name} changes its inputs in place (seen on {self.program.key}).",
                fix="x = x + y instead of x += y, or work on x.clone()",
            )
        if outcome is UNKNOWN:
            return outcome
        return checked(step, outcome, tensors[0], self.program.key, self.compute_dtype)

    def _invoke(self, step: Call, index: int, start: int, tensors: list[Tensor]) -> Any:
        remaining = iter(tensors)
        base = next(remaining) if step.base is not None else None
        inputs = {name: [next(remaining) for _ in places] for name, places in step.inputs}
        key = step.key or self.program.key
        remembered = self._remembered if index >= 0 else None  # else it is a part of a block
        return step.method.invoke(
            inputs,
            base,
            step.parameters,
            layer_name=key,
            base_index=step.base_index,
            draw=Draw(self.seed, (step.node, key), start, remembered),
        )

    # --- the end of a round

    def advance(self) -> bool:
        """Finish the round's questions. True if another round is worth while; False if all that
        is open waits for answers about the whole model."""
        progress = False
        for place, gathering in self._gatherings.items():
            if gathering.operands is not None:
                progress |= self._apply_whole(place, gathering)
        for place, dialogue in self._dialogues.items():
            if place not in self._gatherings:
                progress |= dialogue.finish()
        return progress

    def _apply_whole(self, place: int, gathering: Gathering) -> bool:
        """Call a method that sees the whole tensor, on operands gathered in this round."""
        step, dialogue = self.program.steps[place], self._dialogues.get(place)
        assert isinstance(step, Call)
        assert gathering.operands is not None
        tensors = [whole.view(self.grid.shape) for whole in gathering.operands]
        while True:
            outcome = self._apply(step, dialogue, 0, 0, tensors)
            if outcome is not UNKNOWN:
                gathering.result, gathering.operands = outcome, None
                return True
            if dialogue is None or not dialogue.finish():
                return False
