"""The boundary between YAML text and plain data that remembers its lines.

Values are those of `yaml.safe_load`; keys are kept as they are written (`on` stays a word). Size
after expansion and depth are limited, since a few hundred bytes of aliases can mean terabytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from distmerge.errors import RecipeError

MOST_VALUES = 100_000
"""Values in a document once its aliases are expanded."""
DEEPEST = 50
"""Levels of mappings and lists."""

KeyPath = tuple[str | int, ...]
_STANDARD = "tag:yaml.org,2002:"
_MERGE_TAG = f"{_STANDARD}merge"
_PLAIN_TAGS = {
    f"{_STANDARD}{kind}"
    for kind in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map", "merge", "value")
}
_Pair = tuple[str, yaml.Node, yaml.Node]


@dataclass
class Found:
    """What one document says."""

    data: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    """One-based line of each key and each list item."""
    warnings: list[str] = field(default_factory=list)


def read_yaml(text: str, origin: str) -> Found:
    """One document; `origin` stands for it in messages.

    Raises
        RecipeError: not YAML (with line and column), several documents, too deep, too large.
    """
    found = read_yaml_documents(text, origin)
    if len(found) > 1:
        raise RecipeError(
            f"{origin} holds several documents.", fix="give one, without '---' between its keys"
        )
    return found[0]


def read_yaml_documents(text: str, origin: str) -> list[Found]:
    """Every document, at least one; empty ones behind it are left out. Raises as `read_yaml`."""
    try:
        # The reader checks characters as soon as it is made.
        loader = yaml.SafeLoader(text)
        found: list[Found] = []
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            if not found or node.value != "":  # a last '---' begins an empty one
                reading = _Reading(origin, loader)
                reading.found.data = reading.build(node, ())
                found.append(reading.found)
        return found or [Found()]
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{origin}, line {line}: this is not YAML.",
            f"the character #x{error.character:04x} isn't allowed",
            fix="save it as plain UTF-8 text",
        ) from None
    except yaml.MarkedYAMLError as error:
        raise _malformed(error, origin) from None
    except RecursionError:
        raise _too_deep(origin) from None


def kind_of(value: Any) -> str:
    """What a value is, in words for a message; a word's own text is not shown."""
    if value is None:
        return "nothing"
    for kind, words in ((dict, "a mapping"), (list, "a list"), (str, "a word or a sentence")):
        if isinstance(value, kind):
            return words
    return f"the value {value!r}"


class _Reading:
    """One pass over a document's nodes."""

    def __init__(self, origin: str, loader: yaml.SafeLoader) -> None:
        self.found = Found()
        self._origin = origin
        self._loader = loader
        self._values = 0
        self._nodes: set[int] = set()
        self._checked: set[int] = set()

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """The node's value, lists and mappings with all below them."""
        self._nodes.add(id(node))
        self._count(path)
        if node.tag not in _PLAIN_TAGS:
            raise RecipeError(
                f"{self._origin}, line {_line(node)}: {_shown(node.tag, path)} is no kind of value "
                "here.",
                fix="leave the tag out: numbers, words, lists and mappings need none",
            )
        if isinstance(node, yaml.SequenceNode):
            return [self._placed(item, item, (*path, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            # A key that comes again, after a merge say, replaces the earlier one.
            pairs = {key: (at, value) for key, at, value in self._pairs(node, path)}
            return {
                key: self._placed(at, value, (*path, key)) for key, (at, value) in pairs.items()
            }
        try:
            return self._loader.construct_object(node)
        except (ValueError, ArithmeticError) as error:  # 2024-13-45 looks like a date
            raise RecipeError(
                f"{self._origin}, line {_line(node)}: {_shown(node.value, path)} can't be read.",
                *([] if _is_secret(path) else [str(error)]),
                fix="put it in quotes",
            ) from None

    def _placed(self, at: yaml.Node, value: yaml.Node, path: KeyPath) -> Any:
        self.found.lines[path] = _line(at)
        return self.build(value, path)

    def _pairs(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[_Pair]:
        """Key, its node and its value, merged mappings (`<<: *name`) first."""
        self._check_keys(node, path)
        for key, value in node.value:
            if key.tag == _MERGE_TAG:
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in reversed(sources):
                    yield from self._merged(source, path)
        for key, value in node.value:
            if key.tag != _MERGE_TAG:
                yield key.value, key, value

    def _merged(self, source: yaml.Node, path: KeyPath) -> Iterator[_Pair]:
        if not isinstance(source, yaml.MappingNode):
            raise RecipeError(
                f"{self._origin}, line {_line(source)}: '<<' takes a mapping.",
                fix="<<: *name, with &name before a mapping",
            )
        for pair in self._pairs(source, path):
            self._count(())
            yield pair

    def _check_keys(self, node: yaml.MappingNode, path: KeyPath) -> None:
        if id(node) in self._checked:
            return
        self._checked.add(id(node))
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(
                    f"{self._origin}, line {_line(key)}: a key is a list or a mapping.",
                    fix="keys are words: 'merge_method: linear'",
                )
            if key.value in seen and key.tag != _MERGE_TAG:
                self.found.warnings.append(
                    f"{self._origin}, line {_line(key)}: {_shown(key.value, path)} is given twice; "
                    "the last one counts."
                )
            seen.add(key.value)

    def _count(self, path: KeyPath) -> None:
        self._values += 1
        if self._values > MOST_VALUES:
            raise self._too_many()
        if len(path) > DEEPEST:
            raise _too_deep(self._origin)

    def _too_many(self) -> RecipeError:
        if len(self._nodes) >= MOST_VALUES:
            return RecipeError(
                f"{self._origin} holds more than {MOST_VALUES:,} values, the most of a recipe.",
                "each word, number, list and mapping is one",
                fix="say more with each: a layer_range of many layers, a gradient, a filter",
            )
        return RecipeError(
            f"{self._origin} expands to more than {MOST_VALUES:,} values.",
            "its aliases (*name) repeat one another",
            fix="write the values out",
        )


def _malformed(error: yaml.MarkedYAMLError, origin: str) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    reasons = [part for part in (error.context, error.problem) if part]
    return RecipeError(
        f"{origin}{at}: this is not YAML.",
        ", ".join(reasons),
        fix="check the indentation (spaces, no tabs), the colons and the quotes there",
    )


def _too_deep(origin: str) -> RecipeError:
    return RecipeError(
        f"{origin} is nested more than {DEEPEST} levels deep.", fix="check the brackets"
    )


def _shown(text: str, path: KeyPath) -> str:
    """What stands at a place, unless it may be a secret."""
    return "a value" if _is_secret(path) else repr(text[:80])


def _is_secret(path: KeyPath) -> bool:
    return "storage_options" in path


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
