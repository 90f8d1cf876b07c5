"""From tensors wanted to bytes in memory: which ranges, where they land, how they are viewed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distmerge.checkpoints.ranges import coalesce
from distmerge.checkpoints.store import Store
from distmerge.checkpoints.tensors import DTYPE_BYTES, TensorInfo
from distmerge.checkpoints.views import View
from distmerge.expressions.alignment import TORCH_DTYPES
from distmerge.expressions.rounds import Span
from distmerge.plan.work import Origin, Source
from distmerge.run.arena import ALIGN, Arena, Lease

GAP = 128 * 1024
"""Unwanted bytes that are read along rather than asking twice."""
READERS = 4
"""Ranges of a fetch that are read at once; a store splits long ones further."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A leaf's tensor, or a span of its elements, for one task."""

    task: int
    leaf: int
    info: TensorInfo
    span: Span
    part: int = 0
    """Of a view."""
    source: int = 0
    """Of the part: see `Part`."""

    @property
    def place(self) -> tuple[int, int, int]:
        """What it is found under."""
        return self.task, self.leaf, self.part

    def byte_range(self) -> Span:
        """In the file. A strided tensor is read whole."""
        if self.info.strides is not None:
            return self.info.start, self.info.stop
        item = DTYPE_BYTES[self.info.dtype]
        return self.info.start + self.span[0] * item, self.info.start + self.span[1] * item


@dataclass(frozen=True, slots=True)
class Raw:
    """What a file holds of a tensor, in the arena."""

    flat: Tensor
    first: int = 0
    """Which of the tensor's elements `flat` begins with."""
    aligned: bool = True
    """Files may put a tensor at any byte; arithmetic wants it aligned."""
    view: Tensor | None = None
    """`flat` as the file's strides say, if they aren't those of a row-major tensor."""

    def block(self, span: Span) -> Tensor:
        """The elements of a span in row-major order; a copy only where they don't lie so."""
        if self.view is None:
            found = self.flat[span[0] - self.first : span[1] - self.first]
        else:
            found = rows_of(self.view, span)
        return found if self.aligned else found.clone()


@dataclass
class Fetched:
    """Raw tensors in the arena, until `release`."""

    tensors: dict[tuple[int, int, int], Raw] = field(default_factory=dict)
    """By task, leaf and part."""
    leases: list[Lease] = field(default_factory=list)
    nbytes: int = 0

    def block(self, task: int, leaf: int, span: Span, view: View | None = None) -> Tensor:
        """A leaf's elements in a span, flat: in the file's dtype, or as a view makes them."""
        if view is None:
            return self.tensors[task, leaf, 0].block(span)
        needs = view.needs(span)
        return view.values(span, [self.tensors[task, leaf, n].block(run) for n, run in needs])


class Fetcher:
    """Reads what is wanted through the stores into the arena."""

    def __init__(self, arena: Arena, open_store: Callable[[Source], Store]) -> None:
        self._arena = arena
        self._open = open_store
        self._pool = ThreadPoolExecutor(READERS, "distmerge-read")

    def fetch(self, wanted: Sequence[Wanted], sources: Mapping[Origin, Source]) -> Fetched:
        """Read all that is wanted.

        Raises
            CancelledError: the arena was closed meanwhile.
            ReadFailed, SourceChanged, CheckpointNotFound, AccessDenied
        """
        fetched = Fetched()
        places: dict[tuple[Origin, str], list[Wanted]] = {}
        for want in wanted:
            if want.info.stop > want.info.start:
                origin = want.leaf, want.source
                places.setdefault((origin, want.info.file), []).append(want)
            else:
                empty = torch.empty(0, dtype=TORCH_DTYPES[want.info.dtype])
                fetched.tensors[want.place] = Raw(empty)
        reads = []
        for (origin, file), wants in places.items():
            wants.sort(key=lambda want: want.byte_range()[0])
            firsts = [want.byte_range()[0] for want in wants]
            for start, stop in ranges([want.byte_range() for want in wants]):
                lease = self._arena.take(stop - start, start % ALIGN)
                if lease is None:
                    raise CancelledError
                fetched.leases.append(lease)
                source = sources[origin]
                store = self._open(source)
                reads.append(
                    self._pool.submit(store.read_into, source.files[file], start, lease.view)
                )
                fetched.nbytes += stop - start
                inside = wants[bisect_left(firsts, start) : bisect_left(firsts, stop)]
                _place(fetched, inside, start, stop, lease.view)
        errors = [read.exception() for read in reads]  # every read ends before memory is reused
        for error in errors:
            if error is not None:
                self.release(fetched)
                raise error
        return fetched

    def release(self, fetched: Fetched) -> None:
        """The fetch's memory may be used for the next."""
        fetched.tensors.clear()
        for lease in fetched.leases:
            self._arena.give_back(lease)

    def close(self) -> None:
        self._pool.shutdown()


def ranges(spans: Sequence[Span]) -> list[Span]:
    """What to read of one file: holes up to `GAP` are read along unless they add a quarter."""
    exact = coalesce(spans, gap=0)
    wide = coalesce(exact, gap=GAP)
    wanted = sum(stop - start for start, stop in exact)
    return wide if sum(stop - start for start, stop in wide) <= wanted * 5 // 4 else exact


def _place(
    fetched: Fetched, wants: Sequence[Wanted], start: int, stop: int, view: memoryview
) -> None:
    """View the wanted tensors within one range as torch tensors, without copying."""
    for want in wants:
        first, last = want.byte_range()
        if start <= first and last <= stop and first < last:
            item = DTYPE_BYTES[want.info.dtype]
            piece = view[first - start : last - start]
            flat = torch.frombuffer(piece, dtype=TORCH_DTYPES[want.info.dtype])
            strides = want.info.strides
            fetched.tensors[want.place] = Raw(
                flat,
                first=0 if strides else want.span[0],
                aligned=first % item == 0,
                view=None if strides is None else flat.as_strided(want.info.shape, strides),
            )


def rows_of(view: Tensor, span: Span) -> Tensor:
    """The elements of a span, counted row by row, of a tensor that lies otherwise; a copy of
    no more than the rows that the span touches."""
    if view.dim() < 2 or not view.numel():
        return view.reshape(-1)[span[0] : span[1]]
    width = view.shape[-1]
    first, last = span[0] // width, -(-span[1] // width)
    rows = torch.arange(first, last)
    places = torch.unravel_index(rows, view.shape[:-1])
    return view[places].reshape(-1)[span[0] - first * width : span[1] - first * width]
