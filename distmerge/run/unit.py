"""One work unit from its ranges to its shard: read | merge | write, overlapped.

The next window (`distmerge.run.windows`) is read while this one is merged and the one before is
written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distmerge.checkpoints.row_map import Unfilled
from distmerge.checkpoints.views import View
from distmerge.errors import NonFiniteResult
from distmerge.expressions.alignment import spec_of
from distmerge.expressions.eager import compute_dtype, differing_integers
from distmerge.expressions.evaluate import Evaluation, Place
from distmerge.expressions.model_questions import KeyPartials
from distmerge.expressions.program import Read, Scales
from distmerge.expressions.rounds import Begun, InRounds, ReadBlock, Span
from distmerge.expressions.settle import settle
from distmerge.methods.reductions import Question
from distmerge.plan.memory import WINDOW
from distmerge.plan.work import KeyTask, WorkUnit
from distmerge.run.fetch import Fetched
from distmerge.run.results import ROUNDING, BlockWriter, Tally
from distmerge.run.unit_context import UnitContext
from distmerge.run.windows import Streamed, Window, batches, is_copied, wanted, windows
from distmerge.write.shard import ShardWriter


class UnitRun:
    """Runs one unit. With a writer it merges; without, it only asks about the whole model."""

    def __init__(self, unit: WorkUnit, context: UnitContext, writer: ShardWriter | None) -> None:
        self.unit = unit
        self.context = context
        self.tally = Tally()
        self.bytes_read = 0
        self._folded: dict[Place, tuple[Question, Any]] = {}
        self._by_key: list[KeyPartials] = []
        self._only_ask = writer is None
        self.blocks = (
            BlockWriter(unit.tasks, writer, context.pool, self.tally, WINDOW) if writer else None
        )

    @property
    def model_partials(self) -> list[KeyPartials]:
        """What the keys have to say to questions about the whole model: all at once where their
        order doesn't matter, else key by key, in order."""
        return [self._folded, *self._by_key] if self._folded else self._by_key

    def run(self) -> None:
        """Read, merge and write every key.

        Raises
            ReadFailed, SourceChanged, MethodError, DtypeMismatch, NonFiniteResult, OutputError
        """
        upcoming_windows = windows(
            self.unit.tasks,
            self.context.arena_size,
            self.evaluation,
            group=self.context.group,
            only_ask=self._only_ask,
        )
        upcoming = self._prefetch(upcoming_windows)
        while upcoming is not None:
            window, future = upcoming
            upcoming = None
            fetched = future.result()
            try:
                upcoming = self._prefetch(upcoming_windows)
                self.bytes_read += fetched.nbytes
                self.context.on_bytes(fetched.nbytes, 0)
                self.process(window, fetched)
            except BaseException:
                if upcoming is not None:
                    self._abandon(upcoming[1], fetched)
                raise
            finally:
                self.context.fetcher.release(fetched)

    def _prefetch(self, upcoming: Iterator[Window]) -> tuple[Window, Future[Fetched]] | None:
        window = next(upcoming, None)
        if window is None:
            return None
        wants = wanted(self.unit.tasks, window)
        fetch = self.context.fetcher.fetch
        return window, self.context.prefetcher.submit(fetch, wants, self.unit.sources)

    def _abandon(self, future: Future[Fetched], current: Fetched) -> None:
        """Give back the memory of a window that nobody will look at."""
        self.context.fetcher.release(current)  # the next one may be waiting for this room
        if future.exception() is None:
            self.context.fetcher.release(future.result())

    def evaluation(self, task: KeyTask) -> Any:
        """A key's program, about to be run."""
        dtypes = [spec_of(given)[0] for given in task.inputs.values()]
        return Evaluation(
            task.program,
            task.shape,
            block=task.block,
            compute_dtype=compute_dtype(dtypes),
            seed=self.context.seed,
            device=self.context.device,
            model_answers=self.context.model_answers,
            remembered=self.context.remembered,
        )

    def process(self, window: Window, fetched: Fetched) -> None:
        """Do what there is to be done with what has been read."""
        if window.streamed is None:
            for tasks in batches(self._side_by_side, window, self.context.gathered):
                self._process_group(tasks, fetched)
        elif window.part is not None:
            self._sample(window, window.streamed, fetched)
        elif not window.streamed.left:  # else it was read ahead of knowing
            self._process_stretch(window.tasks[0], window.blocks, window.streamed, fetched)
        self._check_finite()

    @property
    def _side_by_side(self) -> Sequence[Sequence[KeyTask]]:
        """The tasks of what is merged together."""
        return [self.unit.tasks]

    def _check_finite(self) -> None:
        if self.tally.non_finite and not self.context.allow_non_finite:
            raise NonFiniteResult(
                f"The merge gives NaN or infinity in {', '.join(list(self.tally.non_finite)[:8])}.",
                f"shard {self.unit.shard}",
                fix="look at these tensors in the inputs, or --allow-non-finite",
            )

    def _process_group(self, tasks: Sequence[int], fetched: Fetched) -> None:
        merged = [i for i in tasks if not is_copied(self.unit.tasks[i])]
        evaluations = {i: self.evaluation(self.unit.tasks[i]) for i in merged}
        reads = {i: self._reader(i, fetched) for i in tasks}
        found = settle(
            [evaluations[i] for i in merged], [reads[i] for i in merged], self.context.pool
        )
        firsts = {merged[place]: value for place, value in found.items()}
        if self._only_ask:
            for i in merged:
                self._note(evaluations[i])
            return

        def produce(i: int, block: int) -> Any:
            if block == 0 and i in firsts:
                return firsts.pop(i)
            return self._produce(i, block, evaluations.get(i), reads[i])

        items = [(i, b) for i in tasks for b in range(len(self.unit.tasks[i].grid))]
        self._write(items, produce, fetched)

    def _sample(self, window: Window, streamed: Streamed, fetched: Fetched) -> None:
        evaluation = streamed.evaluation
        assert evaluation is not None
        if streamed.sampling:
            sample = partial(evaluation.sample, read=self._reader(window.tasks[0], fetched))
            streamed.sampling = self.context.pool.map(sample, window.blocks)[0]
        if not streamed.sampling or window.blocks[0] == evaluation.sampled[-1]:
            evaluation.use_sample()

    def _process_stretch(self, i: int, blocks: range, streamed: Streamed, fetched: Fetched) -> None:
        """Some blocks of one key in one round; how it begins tells whether it is the last round."""
        evaluation, read = streamed.evaluation, self._reader(i, fetched)
        begun = Begun(settled=streamed.last_round, ask=blocks)
        if blocks[0] == 0:
            if evaluation is None or evaluation.direct:
                begun = Begun(settled=True)
            else:
                begun = self.context.pool.map(evaluation.begin_round, [read])[0]
            streamed.last_round = begun.settled
        if not streamed.last_round:
            assert evaluation is not None
            left = [b for b in blocks if b in begun.ask]
            self._ask(left, blocks[-1], streamed, evaluation, read)
        elif self._only_ask:
            streamed.left = True
        else:

            def produce(i: int, block: int) -> Any:
                if block == 0 and begun.first is not None:
                    return begun.first
                return self._produce(i, block, evaluation, read)

            self._write([(i, b) for b in blocks], produce, fetched)

    def _ask(
        self,
        blocks: Sequence[int],
        last: int,
        streamed: Streamed,
        evaluation: InRounds,
        read: ReadBlock,
    ) -> None:
        """Ask these blocks of the stretch that ends with `last`."""
        self.context.pool.map(lambda b: evaluation.block(b, read), blocks)
        if last == len(evaluation.grid) - 1 and not evaluation.advance():
            self._note(evaluation)
            streamed.left = True

    def _note(self, evaluation: Any) -> None:
        """Keep what a key has to say about the whole model. What folds to the same in any order
        is folded here: a histogram for every key would be more than the answers may weigh."""
        apart: dict[Place, tuple[Question, Any]] = {}
        for place, (question, share) in evaluation.model_partials.items():
            if question.exact:
                before = self._folded.get(place)
                total = share if before is None else question.merge(before[1], share)
                self._folded[place] = (question, total)
            else:
                apart[place] = (question, share)
        if apart:
            self._by_key.append(apart)

    def _produce(self, i: int, block: int, evaluation: Any, read: ReadBlock) -> Any:
        task = self.unit.tasks[i]
        if isinstance(step := task.program.steps[0], Scales):
            assert self.blocks is not None
            start, stop = task.grid.span(block)
            return self.blocks.scales(step.of).view(-1)[start:stop]
        if evaluation is None:
            return self._same(task, task.grid.span(block), read)
        if len(task.program.steps) == 1 and isinstance(task.program.steps[0], Read):
            return read(task.program.steps[0].leaf, task.grid.span(block))
        value = evaluation.block(block, read)
        assert value is not None, "a settled evaluation has a result for every block"
        return value

    def _same(self, task: KeyTask, span: Span, read: ReadBlock) -> Tensor:
        first = read(task.program.leaves[0], span)
        for leaf in task.program.leaves[1:]:
            if not torch.equal(first, read(leaf, span)):
                sources = self.unit.sources
                names = [sources[n, 0].name for n in task.program.leaves if (n, 0) in sources]
                raise differing_integers(task.program.key, task.dtype, names)
        return first

    def _reader(self, i: int, fetched: Fetched) -> ReadBlock:
        inputs = self.unit.tasks[i].inputs
        memory = {n: x.detach().reshape(-1) for n, x in inputs.items() if isinstance(x, Tensor)}
        views = {n: x for n, x in inputs.items() if isinstance(x, View)}
        whole = threading.Lock()

        def read(leaf: int, span: Span) -> Tensor:
            view = views.get(leaf)
            if view is not None and view.whole:
                with whole:  # once, by whoever comes first
                    if leaf not in memory:
                        memory[leaf] = fetched.block(i, leaf, (0, view.elements), view)
            if leaf in memory:
                return memory[leaf][span[0] : span[1]]
            return fetched.block(i, leaf, span, view)

        return read

    def _write(
        self, items: list[tuple[int, int]], produce: Callable[[int, int], Any], fetched: Fetched
    ) -> None:
        assert self.blocks is not None
        base = partial(self._base, fetched)
        self.context.on_bytes(0, self.blocks.write(items, produce, base))

    def _base(self, fetched: Fetched, i: int, block: int) -> Tensor | None:
        """The base's elements, where lost deltas are to be counted."""
        task = self.unit.tasks[i]
        if task.base is None or task.dtype not in ROUNDING:
            return None
        held, span = task.inputs[task.base], task.grid.span(block)
        if isinstance(held, Unfilled) and span[1] > held.known * held.row:
            return None
        return self._reader(i, fetched)(task.base, span)
