"""The boundary between sizes as people write them and bytes."""

from __future__ import annotations

import re

from distmerge.errors import RecipeError

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS: dict[str, int] = {
    **{f"{prefix}{tail}": n for prefix, n in _DECIMAL.items() for tail in ("", "B")},
    **{f"{p}I{tail}": 1024**i for i, p in enumerate("KMGT", 1) for tail in ("", "B")},
    # mergekit counts in thousands, millions and billions, and its users write 5B.
    "B": 10**9,
}
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})\s*([A-Za-z]*)")
LARGEST = 10**18
"""Bytes. More than this is a slip of the keyboard."""


def parse_size(size: str | int) -> int:
    """Bytes in `2GiB`, `500 MB`, `5GB`, `1.5T`, `268435456` or an int, rounded down.

    KB, MB, GB, TB, with or without the last letter, are powers of 1000; KiB, MiB, GiB, TiB of
    1024. A plain B after a number means billions, as in mergekit: `5B` is 5 GB.

    Raises
        RecipeError: it is no size, not positive, or beyond any disk.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return _in_range(size, size)
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise RecipeError(
            f"{size!r:.60} is not a size.", fix="write 2GiB, 500MB, 5GB or a number of bytes"
        )
    return _in_range(_product(found[1], unit), size)


def format_size(nbytes: int) -> str:
    """`1.5 GB`, `817 MB`, `12 bytes`: three digits, powers of 1000."""
    if nbytes < 1000:
        return f"{nbytes} byte{'' if nbytes == 1 else 's'}"
    power = 1
    while power < 4 and nbytes >= 999.5 * 1000**power:
        power += 1
    value = nbytes / 1000**power
    digits = f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
    return f"{digits} {' KMGT'[power]}B"


def _product(number: str, unit: int) -> int:
    """Exact, where a float would round."""
    whole, _, fraction = number.partition(".")
    scale: int = 10 ** len(fraction)
    return int(whole + fraction) * unit // scale


def _in_range(nbytes: int, size: str | int) -> int:
    if not 0 < nbytes <= LARGEST:
        raise RecipeError(
            f"{size!r:.60} is {'too large' if nbytes > 0 else 'too small'} for a size.",
            fix="write 2GiB, 500MB, 5GB or a number of bytes",
        )
    return nbytes
