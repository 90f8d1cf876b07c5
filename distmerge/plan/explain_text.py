"""What tensors are made of, in lines for people: equal ones together, layers as ranges.

Tensors are together if their trees differ in nothing but the number of the layer, and in the files
that hold them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from distmerge.methods.parameters import layer_of
from distmerge.plan.explain import Explained, Piece, Values

KEYS_SHOWN = 6
"""Names, or patterns of names, in a row."""
_LAYER = "\0"
"""Stands for a layer's number."""


def grouped(tensors: Iterable[Explained]) -> list[list[Explained]]:
    """The tensors, those that are made alike together, in the order of the first of each."""
    found: dict[object, list[Explained]] = {}
    for one in tensors:
        alike = one.dtype, one.lacking, _likeness(one.tree, one.key)
        found.setdefault(alike, []).append(one)
    return list(found.values())


def row(group: Sequence[Explained]) -> tuple[str, str, str]:
    """Names, dtype and tree of a group, of several lines each."""
    patterns = _patterns([one.key for one in group])
    more = len(patterns) - KEYS_SHOWN
    names = patterns[:KEYS_SHOWN] + ([f"... and {more} more"] if more > 0 else [])
    first = group[0]
    shape = f" {' x '.join(map(str, first.shape)) or 'scalar'}" if len(group) == 1 else ""
    lines = list(_lines([(one.tree, one.key) for one in group], ""))
    lines += [f"not in {', '.join(first.lacking)}"] if first.lacking else []
    return "\n".join(names), first.dtype + shape, "\n".join(lines)


def _likeness(piece: Piece, key: str) -> object:
    own = None if piece.place is None else (_relation(piece.place.key, key), piece.place.made)
    below = tuple(_likeness(one, key) for one in piece.below)
    what = "scales" if piece.kind == "scales" else piece.what
    return piece.kind, what, piece.role, _written(piece.values), own, below


def _relation(own: str, key: str) -> object:
    """What a model calls a tensor, as seen from what the output calls it."""
    if own == key:
        return None
    mine, its = layer_of(own), layer_of(key)
    if mine is None or its is None:
        return own
    same = _numberless(own) == _numberless(key)
    return mine[1] - its[1], None if same else _numberless(own)


def _numberless(key: str) -> str:
    found = layer_of(key)
    if found is None:
        return key
    family, number = found
    begin = f"{family}." if family else ""
    return begin + _LAYER + key[len(begin) + len(str(number)) :]


def _lines(pieces: Sequence[tuple[Piece, str]], indent: str) -> Iterator[str]:
    """The lines of trees that are alike; each comes with the output's name of its tensor."""
    piece = pieces[0][0]
    words = [f"{piece.role}:"] if piece.role else []
    if piece.kind == "nested":
        given = _written(piece.values)
        (first, *rest) = _lines([(one.below[0], key) for one, key in pieces], indent)
        yield indent + "  ".join([*words, first.strip(), *([f"({given})"] if given else [])])
        yield from rest
        return
    words.append(_what(piece))
    if piece.place is not None:
        words += [_written(piece.values)] if piece.values else []
        words += _places(pieces)
    elif piece.values:
        words[-1] += f"({_written(piece.values)})"
    yield indent + "  ".join(words)
    for i in range(len(piece.below)):
        yield from _lines([(one.below[i], key) for one, key in pieces], indent + "  ")


def _what(piece: Piece) -> str:
    if piece.kind == "scales":
        return "scales of 8-bit codes"
    return f"{float(piece.what):g}" if piece.kind == "number" else piece.what


def _places(pieces: Sequence[tuple[Piece, str]]) -> list[str]:
    """How a model calls the tensors, if otherwise; what is done to them; which files hold them."""
    found = [(piece.place, key) for piece, key in pieces if piece.place is not None]
    first, output = found[0]
    words = []
    if first.key != output:
        alike = _numberless(first.key) == _numberless(output)
        numbers = [layer[1] for place, _ in found if (layer := layer_of(place.key))]
        patterns = _patterns([place.key for place, _ in found])
        words.append(f"layer {_ranges(numbers)}" if alike else f"as {patterns[0]}")
    words += [first.made] if first.made else []
    files = sorted({file for place, _ in found for file in place.files})
    words += [", ".join(files) if len(files) < 3 else f"{files[0]} .. {files[-1]}"] if files else []
    return words


def _patterns(keys: Sequence[str]) -> list[str]:
    """Names with `{0..3}` instead of layers' numbers."""
    numbers: dict[str, list[int]] = {}
    for key in keys:
        layer = layer_of(key)
        numbers.setdefault(_numberless(key), []).extend([layer[1]] if layer else [])
    return [name.replace(_LAYER, _ranges(found)) for name, found in numbers.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """`3`, `{0..5}`, `{0..2,4}`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ",".join(f"{a}" if a == b else f"{a}..{b}" for a, b in runs)
    return shown if shown.isdigit() else f"{{{shown}}}"


def _written(values: Values) -> str:
    return ", ".join(f"{name}={_value(value)}" for name, value in values)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
