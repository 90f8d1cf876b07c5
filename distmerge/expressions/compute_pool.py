"""Threads that evaluate blocks side by side.

Parallelism is over blocks and keys, never inside a torch operation: torch's own threads would
change results with their number, and two of them on a busy machine can be ten times slower
than one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch to one thread per operation, without inference mode and autocast, and give the
    caller's settings back at the end.

    These are each thread's own: this is about the calling thread, which works beside a pool's. They
    have one from their start, and never the other two.
    """
    before = _to_one_torch_thread()
    try:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                modes.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_num_threads(before)


def _to_one_torch_thread() -> int:
    """Set it for this thread; what it was."""
    # Asked first: a thread that never was takes over whatever another one has set by then.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    return before


class ComputePool:
    """`threads` threads side by side, of which the caller's own is one; the others are started
    once."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._others = (
            ThreadPoolExecutor(threads - 1, "distmerge-block", _to_one_torch_thread)
            if threads > 1
            else None
        )

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`function` of every item, in order. An exception ends it; of several the first item's.

        Threads pull items one by one, so a handful of futures serves a hundred thousand items.
        """
        if self._others is None or len(items) <= 1:
            with torch.no_grad():
                return [function(item) for item in items]
        results: list[R | None] = [None] * len(items)
        todo = iter(range(len(items)))
        failed = threading.Event()

        def pull(caught: type[BaseException]) -> tuple[int, BaseException] | None:
            # Each thread's own, so it is entered where the work is done; once, as blocks are many.
            with torch.no_grad():
                for i in todo:
                    try:
                        results[i] = function(items[i])
                    except caught as error:
                        failed.set()
                        return i, error
                    if failed.is_set():  # afterwards: what was pulled before another item is done
                        break
            return None

        count = min(self.threads, len(items)) - 1
        others = [self._others.submit(pull, BaseException) for _ in range(count)]
        try:
            ends = [pull(Exception)]
            # Every thread stops before anything is torn down; who hasn't begun has nothing to do.
            ends += [other.result() for other in others if not other.cancel()]
        except BaseException:  # an interrupt: what was asked for isn't wanted any more
            failed.set()
            raise
        if errors := [end for end in ends if end is not None]:
            raise min(errors, key=itemgetter(0))[1]
        return results  # type: ignore[return-value]

    def close(self) -> None:
        if self._others is not None:
            self._others.shutdown()
