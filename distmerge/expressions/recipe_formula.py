"""The boundary between a formula in a recipe and a tree that means a merge and nothing else.

    models: {a: org/a, b: org/b, base: org/base}
    merge: 0.5 * ties(models=[a, b], base=base, density=0.2) + 0.5 * base

The words are Python's, read by its parser; whatever is neither arithmetic, a number, a name nor a
call of a merge method is refused where it stands. Nothing is run.
"""

from __future__ import annotations

import ast
import keyword
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distmerge.credentials import redact
from distmerge.errors import RecipeError
from distmerge.expressions.recipe_text import Document

WORDS: Mapping[str, bool | None] = {"true": True, "false": False, "null": None}
"""What YAML calls these values."""
LONGEST_FORMULA = 20_000
"""Characters."""
DEEPEST_FORMULA = 100
"""Calls, brackets and operators within one another."""
_SHOWN = 72
"""Characters of a formula that an error shows."""
_ALLOWED = (
    *(ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Call, ast.keyword),
    *(ast.List, ast.Tuple, ast.Load, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.UAdd),
)
_FORM = "0.5 * ties(models=[a, b], base=base, density=0.2) + 0.5 * base"


@dataclass(frozen=True)
class Formula:
    """A formula whose form has been checked; its names have not."""

    text: str
    """On one line."""
    tree: ast.expr
    document: Document

    def models(self) -> list[str]:
        """The names of models, in the order in which they are met, a call's base first."""
        return list(dict.fromkeys(self.uses()))

    def uses(self) -> list[str]:
        """The same, each name as often as it is there."""
        return [node.id for node in _models(self.tree)]

    def where(self, node: ast.expr) -> str:
        """`recipe.yml, line 3, column 8 of merge`."""
        return _where(self.document, node.col_offset)

    def error(
        self, node: ast.expr | ast.keyword, headline: str, *facts: str, fix: str
    ) -> RecipeError:
        """An error that shows the place in the formula."""
        return _error(self.document, self.text, node.col_offset, headline, *facts, fix=fix)


def read_formula(document: Document) -> Formula:
    """The formula under `merge:`.

    Raises
        RecipeError: not a formula, with line and column.
    """
    given = document.data["merge"]
    if not isinstance(given, str) or not given.strip():
        where = document.where(("merge",))
        raise RecipeError(f"{where}: merge is a formula, not {given!r}.", fix=f"merge: {_FORM}")
    text = " ".join(given.split("\n")).strip()
    if len(text) > LONGEST_FORMULA:
        raise RecipeError(
            f"{document.where(('merge',))}: the formula is too long.",
            f"it has {len(text):,} characters, and {LONGEST_FORMULA:,} is the most",
            fix="name parts of it, as documents of their own",
        )
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        at = max((error.offset or 1) - 1, 0)
        reason = str(error.msg)
        hint = "write lambda_=0.9" if "lambda" in text else f"merge: {_FORM}"
        headline = f"the formula can't be read: {reason}"
        raise _error(document, text, min(at, len(text)), headline, fix=hint) from None
    except (ValueError, RecursionError, MemoryError):
        raise _too_deep(document) from None
    formula = Formula(text, tree, document)
    _check(formula, tree, 0)
    return formula


def _check(formula: Formula, node: ast.AST, depth: int) -> None:
    """Refuse whatever means nothing here. Raises RecipeError."""
    if depth > DEEPEST_FORMULA:
        raise _too_deep(formula.document)
    if not isinstance(node, _ALLOWED):
        shown = node if isinstance(node, ast.expr) else formula.tree
        text = ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__
        raise formula.error(
            shown,
            f"{text!r} means nothing in a formula",
            "a formula has + - * /, numbers, names of models and calls of merge methods",
            fix=f"merge: {_FORM}",
        )
    if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
        raise formula.error(
            node, "only merge methods can be called", fix="'distmerge methods' lists them"
        )
    if isinstance(node, ast.keyword) and node.arg is None:
        raise formula.error(node, "** means nothing in a formula", fix="name=value, one by one")
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.operator | ast.unaryop) and not isinstance(child, _ALLOWED):
            assert isinstance(node, ast.expr)
            text = ast.unparse(node)
            raise formula.error(node, f"{text!r} is no arithmetic of models", fix="use + - * /")
        _check(formula, child, depth + 1)


def _models(node: ast.AST) -> Iterator[ast.Name]:
    if isinstance(node, ast.Name):
        if node.id not in WORDS:
            yield node
    elif isinstance(node, ast.Call):
        words = sorted(node.keywords, key=lambda word: word.arg != "base")
        base = [word.value for word in words if word.arg == "base"]
        for given in (*base, *node.args, *(word.value for word in words[len(base) :])):
            yield from _models(given)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _models(child)


def named_models(document: Document) -> dict[str, Any]:
    """What `models:` calls the formula's models.

    Raises
        RecipeError: not a mapping; a name that no formula could hold.
    """
    models = document.data.get("models") or {}
    if not isinstance(models, dict):
        raise RecipeError(
            f"{document.where(('models',))}: with 'merge:', models are given by name.",
            fix="models: {law: org/law, base: org/base}",
        )
    for name in models:
        _check_name(document, name)
    return models


def _check_name(document: Document, name: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name) or name in WORDS:
        raise RecipeError(
            f"{document.where(('models', name))}: {name!r} can't be used in a formula.",
            "a name there has letters, digits and _, and doesn't begin with a digit",
            fix="models: {law: org/law, base: org/base}",
        )


def _pointer(text: str, column: int) -> list[str]:
    """The formula, or the part of it around a place, and a mark below the place."""
    begin = max(0, min(column - _SHOWN // 2, len(text) - _SHOWN))
    return [redact(text)[begin : begin + _SHOWN], " " * (column - begin) + "^"]


def _where(document: Document, column: int) -> str:
    return f"{document.where(('merge',))}, column {column + 1} of merge"


def _error(
    document: Document, text: str, column: int, headline: str, *facts: str, fix: str
) -> RecipeError:
    shown = _pointer(text, column)
    return RecipeError(f"{_where(document, column)}: {headline}.", *shown, *facts, fix=fix)


def _too_deep(document: Document) -> RecipeError:
    return RecipeError(
        f"{document.where(('merge',))}: the formula is nested too deeply.",
        f"{DEEPEST_FORMULA} levels are the most",
        fix="name parts of it, as documents of their own",
    )
