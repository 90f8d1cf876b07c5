"""What several programs make of one block, made once.

While a block is `shared`, `once` hands out what it made before of the same operands: the task
vectors of sixteen candidates over the same models, the histogram that serves every density, a
sub-expression that they have in common. Operands are the same if they lie at the same place in
memory, so nothing has to be compared; what was made, and what of, is held until the block is done.
Elsewhere `once` makes what it is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from distmerge.methods.difference import Difference, Operand, Spread, Thinned

T = TypeVar("T")

_now = threading.local()


@contextmanager
def shared() -> Iterator[None]:
    """A block of which several programs are run in this thread, one after the other."""
    _now.made = {}
    try:
        yield
    finally:
        _now.made = None


def is_shared() -> bool:
    """Is this thread at such a block?"""
    return getattr(_now, "made", None) is not None


def once(
    what: Hashable, operands: Sequence[Operand], make: Callable[[], T], *, unless: Any = None
) -> T:
    """What `make` returns; in a shared block what it returned for the same `what` and operands.

    unless: a result that is not kept.
    """
    made: dict[Hashable, tuple[Any, Sequence[Operand]]] | None = getattr(_now, "made", None)
    if made is None:
        return make()
    place = (what, *map(_place, operands))
    if place in made:
        found: T = made[place][0]
        return found
    result = make()
    if unless is None or result is not unless:
        made[place] = result, operands  # held, so that nothing else comes to lie there
    return result


def _place(x: Operand) -> Hashable:
    if isinstance(x, Difference):
        return _place(x.model), _place(x.base)
    if isinstance(x, Thinned):
        return _place(x.delta), id(x.bits), x.first
    if isinstance(x, Spread):
        return id(x)
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def is_plain(value: Any) -> bool:
    """Does a parameter's text tell all of it?"""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
