"""`evaluate:` and `keep:` of a sweep: which function scores its candidates, which are written.

evaluate: judging.py:accuracy                     a lazy state dict, a model or a pipeline
evaluate: {function: judging:accuracy, given: model, at_once: 2}
evaluate: {perplexity: heldout.txt, context: 1024, stride: 512}
keep: best 3 by accuracy                          also: best 2 by loss (lowest), all, none
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import cloudpickle
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from distmerge.errors import RecipeError
from distmerge.methods.user_code import load_function

Given = Literal["state_dict", "model", "pipeline"]
LARGEST_TEXT = 256 << 20
"""Bytes: all of it is held in memory, and every token of it scored for each candidate."""
LOWER_IS_BETTER = ("perplexity", "loss")
"""Scores with these words in their name are good when they are low, unless it is said."""


class Evaluate(BaseModel):
    """How the candidates are scored."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    function: str | Callable[..., Any] | None = None
    """`module:function`, `path/to/file.py:function`; from Python the function itself."""
    perplexity: str | None = None
    """A text file: the built-in evaluator of causal models."""
    given: Given | None = None
    """What the function gets. None goes by the name of its first parameter."""
    at_once: int | None = Field(None, ge=1)
    """Candidates that are evaluated at the same time; None is one, or on Ray one a worker."""
    distances: bool = True
    """Are candidates compared with their parents, for the report? That reads the inputs again."""
    context: int | None = Field(None, ge=2)
    """Tokens of a window, for perplexity; None is the model's own limit, at most 1024."""
    stride: int | None = Field(None, ge=1)
    """Tokens between the beginnings of two windows; None is half a context."""

    @model_validator(mode="before")
    @classmethod
    def _read_short(cls, value: Any) -> Any:
        return {"function": value} if isinstance(value, str) or callable(value) else value

    @field_validator("function")
    @classmethod
    def _check_spelling(cls, value: Any) -> Any:
        if isinstance(value, str) and not re.fullmatch(r".+:[A-Za-z_]\w*", value):
            raise RecipeError("it is module:function, or path/to/file.py:function")
        return value

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.function is None) == (self.perplexity is None):
            raise RecipeError("it has a function, or perplexity: and a text file")
        for name in ("context", "stride") if self.function is not None else ("given",):
            if getattr(self, name) is not None:
                raise RecipeError(f"{name} has no effect here")
        if self.context and self.stride and self.stride >= self.context:
            raise RecipeError("stride must be less than context")
        return self


class Keep(BaseModel):
    """Which candidates are written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int | None
    """The most that are; None is all."""
    metric: str | None = None
    lowest: bool = False
    """Are low scores good?"""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.strip() in ("all", "none"):
            return {"count": None if value.strip() == "all" else 0}
        pattern = r"\s*best\s+(\d+)\s+by\s+(\S+?)\s*(?:\((lowest|highest)\))?\s*"
        found = re.fullmatch(pattern, value)
        if found is None or int(found[1]) < 1:
            raise RecipeError("it is 'best 3 by score', 'best 3 by loss (lowest)', all or none")
        return {
            "count": int(found[1]),
            "metric": found[2],
            "lowest": found[3] == "lowest" if found[3] else is_better_low(found[2]),
        }

    def __str__(self) -> str:
        if self.metric is None:
            return "none" if self.count == 0 else "all"
        return f"best {self.count} by {self.metric} ({'lowest' if self.lowest else 'highest'})"


ALL, NONE = Keep(count=None), Keep(count=0)


class Judging(BaseModel):
    """What a sweep says besides its recipe and its space."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    evaluate: Evaluate | None = None
    keep: Keep | None = None
    """None is all, or none where candidates are evaluated: their scores say what to keep."""

    @model_validator(mode="after")
    def _check_keep(self) -> Self:
        if self.evaluate is None and self.keep is not None and self.keep != ALL:
            raise RecipeError(
                "'keep' goes by scores, and there is no 'evaluate'.",
                fix="evaluate: judging.py:score",
            )
        by_text = self.evaluate is not None and self.evaluate.perplexity is not None
        metric = self.kept.metric
        if by_text and metric not in (None, "perplexity"):
            raise RecipeError(
                f"'keep' goes by {metric!r}, and the score of a text is its 'perplexity'.",
                fix=f"keep: best {self.kept.count} by perplexity",
            )
        return self

    @property
    def kept(self) -> Keep:
        """Which candidates are written."""
        return self.keep or (NONE if self.evaluate else ALL)


@dataclass(frozen=True)
class Evaluator:
    """A function that scores candidates, ready to be called."""

    function: Callable[[Any], Any]
    given: Given
    name: str
    digest: str
    """Of its source and settings: scores of another one don't hold."""


def load_evaluator(wanted: Evaluate) -> Evaluator:
    """Import the function, read the text.

    Raises
        RecipeError: there is none, it takes nothing, the text can't be read.
    """
    if wanted.perplexity is not None:
        return _perplexity(wanted)
    assert wanted.function is not None
    spelling = wanted.function
    function = load_function(spelling) if isinstance(spelling, str) else spelling
    name = spelling if isinstance(spelling, str) else getattr(spelling, "__name__", "function")
    if not callable(function):
        raise RecipeError(f"evaluate: {name} is no function.", fix="name a function")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables in C don't tell
        signature = inspect.signature(lambda state_dict: None)
    parameters = list(signature.parameters)
    try:
        signature.bind(None)
    except TypeError:
        takes = ", ".join(parameters) or "nothing"
        raise RecipeError(
            f"evaluate: {name} takes {takes}, and it is given the candidate alone.",
            fix="def score(model): ..., def score(state_dict): ... or def score(pipeline): ...",
        ) from None
    by_name = parameters[0] if parameters[0] in get_args(Given) else "state_dict"
    given: Any = wanted.given or by_name
    return Evaluator(function, given, name, _digest(name, given, _source(function)))


def is_better_low(metric: str) -> bool:
    """Is a score of this name good when it is low?"""
    return any(word in metric.lower() for word in LOWER_IS_BETTER)


def _perplexity(wanted: Evaluate) -> Evaluator:
    from distmerge.huggingface.perplexity import text_perplexity

    place, text = _read_text(str(wanted.perplexity))
    score = functools.partial(
        text_perplexity, text=text, context=wanted.context, stride=wanted.stride
    )
    settings = f"{wanted.context} {wanted.stride}"
    return Evaluator(
        score, "pipeline", f"perplexity on {place.name}", _digest("perplexity", settings, text)
    )


def _read_text(name: str) -> tuple[Path, str]:
    """A file and what it holds. Raises RecipeError."""
    try:
        place = Path(name).expanduser()
        if place.exists() and not place.is_file():
            raise OSError(f"{name} is no regular file")
        with place.open("rb") as file:
            content = file.read(LARGEST_TEXT + 1)
        if len(content) > LARGEST_TEXT:
            raise OSError(f"{name} has more than {LARGEST_TEXT:,} bytes")
        # As a text file is read: any way to end a line is one.
        return place, io.StringIO(content.decode("utf-8"), newline=None).read()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a NUL, no UTF-8
        raise RecipeError(
            f"The text for perplexity can't be read: {error}", fix="evaluate: {perplexity: FILE}"
        ) from None


def _source(function: Callable[..., Any]) -> str:
    """The text of the function's file, since it may call others there."""
    try:
        module = inspect.getmodule(function)
        return inspect.getsource(module if module is not None else function)
    except (OSError, TypeError):
        return hashlib.blake2b(cloudpickle.dumps(function)).hexdigest()


def _digest(*parts: str) -> str:
    text = hashlib.blake2b(digest_size=16)
    for part in parts:
        text.update(part.encode() + b"\0")
    return text.hexdigest()
