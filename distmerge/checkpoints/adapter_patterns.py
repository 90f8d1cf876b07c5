"""The boundary between an adapter's rank_pattern and alpha_pattern and the modules they are for.

peft reads their keys as regular expressions. They come with the adapter, from anyone, and some
would keep Python's `re` busy for ever; so they are matched by the engine behind pydantic, whose
time grows with the length of the name and no faster. What it lacks (looking around, repeating what
was matched) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic_core import SchemaError, SchemaValidator, core_schema

from distmerge.checkpoints.malformed import quoted
from distmerge.errors import MalformedCheckpoint

T = TypeVar("T", int, float)

LONGEST_PATTERN = 1_000
"""Characters."""
MOST_PATTERNS, MOST_COSTLY = 10_000, 100
"""Patterns of one table, and those among them that are more than a name: each of these can take a
tenth of a second to prepare."""
MOST_MATCHES = 20_000_000
"""Modules times patterns."""
_NAME = re.compile(r"(?:\.\*)?(?:[\w.-]|\\[.-])+")
"""A module's name, or the end of one, its dots escaped or not."""


@dataclass(frozen=True)
class Patterns(Generic[T]):
    """Values for modules by patterns of their names."""

    entries: tuple[tuple[SchemaValidator, T], ...] = ()

    def value_of(self, module: str, default: T) -> T:
        """The first pattern that the end of the module's name fits counts, as in peft."""
        for pattern, value in self.entries:
            if pattern.isinstance_python(module):
                return value
        return default


def read_patterns(given: Mapping[str, T], table: str) -> Patterns[T]:
    """A table of an adapter_config.json.

    Raises
        MalformedCheckpoint: more patterns than any adapter has, or one that can't be matched in
            bounded time.
    """
    costly = [pattern for pattern in given if not _NAME.fullmatch(pattern)]
    for count, most, what in (
        (len(given), MOST_PATTERNS, "patterns"),
        (len(costly), MOST_COSTLY, "patterns that are more than a module's name"),
    ):
        if count > most:
            raise MalformedCheckpoint(f"{table} has {count:,} {what}; {most:,} is the most.")
    return Patterns(tuple((_compiled(text, table), value) for text, value in given.items()))


def check_matches(tables: tuple[Patterns[int], Patterns[float]], modules: int, place: str) -> None:
    """Refuse tables that would be gone through for hours. Raises MalformedCheckpoint."""
    count = modules * sum(len(table.entries) for table in tables)
    if count > MOST_MATCHES:
        raise MalformedCheckpoint(
            f"{place} has {modules:,} modules and too many patterns in rank_pattern and "
            "alpha_pattern.",
            f"each module is held against each pattern: {count:,} times of at most "
            f"{MOST_MATCHES:,}",
            fix="write patterns that fit many modules each",
        )


def _compiled(pattern: str, table: str) -> SchemaValidator:
    reason = f"it has {len(pattern):,} characters; {LONGEST_PATTERN:,} is the most"
    if len(pattern) <= LONGEST_PATTERN:
        try:
            whole = rf"^(?:.*\.)?(?:{pattern})$"
            return SchemaValidator(core_schema.str_schema(pattern=whole, regex_engine="rust-regex"))
        except SchemaError as error:
            reason = str(error).strip().rpartition("\n")[2].strip()
    raise MalformedCheckpoint(
        f"{table} has a pattern that can't be matched: {quoted(pattern)}.",
        reason[:200],
        fix="write the end of the module's name, such as layers.0.self_attn.q_proj",
    )
