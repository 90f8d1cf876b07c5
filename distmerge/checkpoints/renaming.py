"""A checkpoint under other names than its files': rules that a user gives, applied to its keys.

A rule is a prefix or a regular expression and what stands instead. Each is applied to what the
ones before it made of a key.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distmerge.checkpoints.quantised import refuse_packed
from distmerge.checkpoints.tensors import Checkpoint
from distmerge.errors import KeyMismatch, ParameterError

Rename = Mapping[str, str] | Sequence[Mapping[str, str]]
"""Prefixes and what stands instead; or rules {prefix or regex, to}."""
FORM = "rename: {'old.prefix.': 'new.prefix.'}, or [{regex: '^h[.]', to: 'model.layers.'}]"
LONGEST_SEARCH = 10.0
"""Seconds that a regular expression has for all keys of a model: some take ages on a long one."""


@dataclass(frozen=True)
class Rule:
    """What stands instead of what."""

    pattern: str
    to: str
    """For a regular expression with its groups as `\\1`."""
    is_regex: bool = False

    def on(self, keys: Iterable[str]) -> Iterator[str]:
        """What each key is called then. Raises ParameterError for a regular expression that tries
        too many ways to fit."""
        if not self.is_regex:
            for key in keys:
                found = key.startswith(self.pattern)
                yield self.to + key.removeprefix(self.pattern) if found else key
            return
        import regex  # Python's re has no time limit

        pattern, end = regex.compile(self.pattern), time.monotonic() + LONGEST_SEARCH
        for key in keys:
            try:
                yield pattern.sub(self.to, key, timeout=_until(end))
            except TimeoutError:
                raise ParameterError(
                    f"rename's {self.pattern!r} takes too long on {key!r}.",
                    f"all keys of a model have {LONGEST_SEARCH:g} s",
                    fix="don't repeat a group that holds repeats or |: a+ instead of (a|aa)+",
                ) from None


def _until(end: float) -> float:
    """Seconds that are left. Raises TimeoutError: none."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def read_rules(given: Any) -> tuple[Rule, ...]:
    """Rules from a mapping of prefixes, or a list of {prefix or regex, to}.

    Raises
        ParameterError: neither of them, or a regular expression that isn't one.
    """
    if given is None:
        return ()
    if isinstance(given, Mapping):
        given = [{"prefix": prefix, "to": to} for prefix, to in given.items()]
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ParameterError(f"rename takes rules, not {given!r}.", fix=FORM)
    return tuple(rule if isinstance(rule, Rule) else _rule(rule) for rule in given)


def _rule(given: Any) -> Rule:
    kinds = [kind for kind in ("prefix", "regex") if isinstance(given, Mapping) and kind in given]
    if len(kinds) != 1 or set(given) != {*kinds, "to"}:
        raise ParameterError(f"{given!r} is no rule to rename by.", fix=FORM)
    pattern, to = given[kinds[0]], given["to"]
    if not isinstance(pattern, str) or not isinstance(to, str):
        raise ParameterError(f"{given!r} renames something that is no name.", fix=FORM)
    if kinds == ["regex"]:
        import regex

        try:
            re.compile(pattern).sub(to, "")
            regex.compile(pattern)
        except (re.error, regex.error, IndexError, OverflowError, RecursionError) as error:
            reason = f"{pattern!r} -> {to!r} is not a regular expression and its replacement"
            raise ParameterError(
                f"{reason}: {error}.", fix="Python's re describes them; prefix: takes plain text"
            ) from None
    return Rule(pattern, to, kinds == ["regex"])


def renamed(checkpoint: Checkpoint, rules: Sequence[Rule]) -> Checkpoint:
    """The checkpoint with its keys renamed; nothing is read.

    Raises
        KeyMismatch: two keys get one name, or one gets none.
        CheckpointError: its weights are packed in a way that isn't read.
    """
    if not rules:
        return checkpoint
    refuse_packed(checkpoint)  # by its own names
    known = dict.fromkeys([*checkpoint.tensors, *checkpoint.views, *checkpoint.aliases])
    names = {key: key for key in known}
    idle = []
    for rule in rules:
        then = dict(zip(names, rule.on(names.values()), strict=True))
        if then == names:
            idle.append(rule)
        names = then
    _check(names, checkpoint)

    def under(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {names[key]: found for key, found in tensors.items()}

    return replace(
        checkpoint,
        tensors=under(checkpoint.tensors),
        views=under(checkpoint.views),
        used=under(checkpoint.used),
        aliases={alias: names[key] for alias, key in under(checkpoint.aliases).items()},
        renamed={name: key for key, name in names.items() if name != key},
        warnings=tuple(
            f"{checkpoint.url} has no key that rename's {rule.pattern!r} fits." for rule in idle
        ),
        settings=f"{checkpoint.settings}\nrename {list(rules)}".strip(),
    )


def _check(names: Mapping[str, str], checkpoint: Checkpoint) -> None:
    first: dict[str, str] = {}
    for key, name in names.items():
        if not name:
            raise KeyMismatch(
                f"rename leaves nothing of the name of {key[:200]} of {checkpoint.url}.",
                fix="end the prefix, or the regular expression, before the key's end",
            )
        if first.setdefault(name, key) != key:
            raise KeyMismatch(
                f"rename gives two tensors of {checkpoint.url} one name, {name[:200]}.",
                f"{first[name][:200]} and {key[:200]}",
                fix="write rules that tell them apart",
            )
