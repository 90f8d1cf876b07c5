"""From a formula of a recipe to the expression that Python's arithmetic builds of its words."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from distmerge.errors import DistmergeError, RecipeError
from distmerge.expressions.call_arguments import CallOptions, bind
from distmerge.expressions.calls import call_method
from distmerge.expressions.lazy import LazyStateDict
from distmerge.expressions.nodes import OnMissing, Operator, TensorLeaf
from distmerge.expressions.recipe_formula import WORDS, Formula
from distmerge.methods.method import MergeMethod
from distmerge.methods.registry import find_method

_OPTIONS = frozenset({"on_missing", "passthrough"})
"""Keywords of every call that a formula takes too."""
_OPERATORS: dict[type[ast.operator], Operator] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
}
_SHOWN = 40
"""Characters of a number that an error shows."""
_NUMBERS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def build_formula(
    formula: Formula, model: Callable[[str], LazyStateDict], on_missing: OnMissing
) -> LazyStateDict:
    """What a formula means.

    model: what a name stands for.
    on_missing: of calls that say nothing of it; operators heed `common`.

    Raises
        RecipeError, ParameterError: with the place in the formula.
    """
    found = _Builder(formula, model, on_missing).build(formula.tree)
    if not isinstance(found, LazyStateDict):
        raise formula.error(formula.tree, "it gives no model", fix="merge: 0.5 * a + 0.5 * b")
    return found


def check_formula(formula: Formula, on_missing: OnMissing) -> None:
    """Refuse what can be known to be wrong before a model is opened. Raises what `build_formula`
    does."""
    _Builder(formula, _stand_in, on_missing, checking=True).build(formula.tree)


def _stand_in(name: str) -> LazyStateDict:
    """A model of which nothing is known but its name."""
    return LazyStateDict(TensorLeaf({}, name))


@dataclass(frozen=True)
class _Builder:
    formula: Formula
    model: Callable[[str], LazyStateDict]
    on_missing: OnMissing
    checking: bool = False
    """Are the models stand-ins, which have no heads to pass through?"""

    def build(self, node: ast.expr) -> Any:
        """A model, a number, a word, or a list of these."""
        if isinstance(node, ast.Constant):
            return self._finite(node, node.value)
        if isinstance(node, ast.Name):
            return WORDS[node.id] if node.id in WORDS else self.model(node.id)
        if isinstance(node, ast.List | ast.Tuple):
            return [self.build(item) for item in node.elts]
        if isinstance(node, ast.UnaryOp):
            value = self._operand(node.operand)
            return -value if isinstance(node.op, ast.USub) else +value
        assert isinstance(node, ast.Call | ast.BinOp)
        try:
            if isinstance(node, ast.BinOp):
                return self._binary(node, _OPERATORS[type(node.op)])
            return self._call(node)
        except DistmergeError as error:
            if any(text.endswith(" of merge") or " of merge: " in text for text in error.args):
                raise  # it names its place
            where = self.formula.where(node)
            raise type(error)(error.headline, *error.facts, where, fix=error.fix) from None

    def _operand(self, node: ast.expr) -> Any:
        value = self.build(node)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number and not isinstance(value, LazyStateDict):
            text = f"{ast.unparse(node)!r} is neither a model nor a number"
            raise self.formula.error(node, text, fix="merge: 0.5 * a + 0.5 * b")
        return value

    def _binary(self, node: ast.BinOp, sign: Operator) -> Any:
        left, right = self._operand(node.left), self._operand(node.right)
        if isinstance(left, LazyStateDict) and isinstance(right, LazyStateDict):
            common: OnMissing = "common" if self.on_missing == "common" else "error"
            return left._binary(sign, right, on_missing=common)
        if isinstance(left, LazyStateDict):
            return left._binary(sign, right)
        if isinstance(right, LazyStateDict):
            return right._binary(sign, left, swapped=True)
        try:
            return self._finite(node, _NUMBERS[sign](left, right))
        except (ArithmeticError, ValueError):
            raise self._no_number(node) from None

    def _finite(self, node: ast.expr, value: Any) -> Any:
        """A constant, or what is made of numbers. Raises RecipeError."""
        try:
            infinite = isinstance(value, int | float) and not math.isfinite(value)
        except OverflowError:  # an integer that no float can be
            infinite = True
        if infinite or isinstance(value, complex):
            raise self._no_number(node)
        return value

    def _no_number(self, node: ast.expr) -> RecipeError:
        start, end = node.col_offset, node.end_col_offset
        text = f"{self.formula.text[start:end][:_SHOWN]!r} is no number"
        return self.formula.error(node, text, fix="give a finite number")

    def _call(self, node: ast.Call) -> LazyStateDict:
        assert isinstance(node.func, ast.Name)
        method = find_method(node.func.id)
        given = {str(word.arg): word for word in node.keywords}
        if len(given) < len(node.keywords) or len(node.args) > 1:
            fix = f"{method.name}(models=[a, b], name=value, ...)"
            raise self.formula.error(node, "a keyword is given twice, or has no name", fix=fix)
        if node.args and method.inputs[0] in given:
            raise self.formula.error(node, "the models are given twice", fix="give them once")
        values = {name: self.build(word.value) for name, word in given.items() if name != "base"}
        values |= {method.inputs[0]: self.build(node.args[0])} if node.args else {}
        self._check_words(node, method, given)
        for name in method.inputs:
            self._check_models(node, method, name, values.get(name))
        index = None
        if "base" in given:
            base, index = self.build(given["base"].value), 0
            self._check_models(node, method, "base", [base])
            values[method.inputs[0]] = [base, *values[method.inputs[0]]]
        elif method.base_required:
            fix = f"{method.name}(models=[a, b], base=base)"
            raise self.formula.error(node, f"{method.name} needs a base", fix=fix)
        options: dict[str, Any] = {"on_missing": self.on_missing, "base_index": index}
        if not method.takes_base and index is None:
            del options["base_index"]
        keywords = {**options, **values}
        if self.checking:
            bind(method, (), keywords)
            keywords.pop("passthrough", None)
        found = call_method(method, **keywords)
        assert isinstance(found, LazyStateDict)
        return found

    def _check_words(
        self, node: ast.Call, method: MergeMethod, given: dict[str, ast.keyword]
    ) -> None:
        """Refuse options of Python's calls that say nothing of what is merged."""
        options = {option.name for option in fields(CallOptions)} - _OPTIONS
        for name in options - method.parameters.keys():
            if name in given:
                fix = "base=NAME" if name == "base_index" else f"leave {name}= out"
                text = f"{name} can't be given in a formula"
                raise self.formula.error(given[name].value, text, fix=fix)

    def _check_models(self, node: ast.Call, method: MergeMethod, name: str, value: Any) -> None:
        models = value if isinstance(value, list) else []
        if not models or not all(isinstance(model, LazyStateDict) for model in models):
            what = "a model" if name == "base" else "a list of models"
            fix = f"{method.name}({method.inputs[0]}=[a, b])"
            raise self.formula.error(node, f"{method.name} takes {what} as {name}", fix=fix)


def unknown_model(formula: Formula, name: str, known: list[str]) -> RecipeError:
    """The error for a name that stands for nothing."""
    node = next(n for n in ast.walk(formula.tree) if isinstance(n, ast.Name) and n.id == name)
    return formula.error(
        node,
        f"no model is called {name!r}",
        f"there are {', '.join(known)}" if known else "models: names none",
        fix=f"models: {{{name}: org/{name}}}",
    )
