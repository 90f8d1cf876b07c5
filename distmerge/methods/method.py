"""What a merge method is: a function, and all that is known of it before it is called."""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from distmerge.errors import ParameterError, RecipeError
from distmerge.methods.blocks import Granularity
from distmerge.methods.random import Draw
from distmerge.methods.source import source_text
from distmerge.methods.user_code import travels_as_code

T = TypeVar("T")
Sight = Callable[[Mapping[str, Any], tuple[int, ...]], Granularity]
"""What a method must see at once, from its parameters and the tensor's shape."""
PER_MODEL = object()
PerModel = Annotated[list[T], PER_MODEL]
"""Annotation of a parameter with one value for each model: the function gets a list."""

REQUIRED: Any = inspect.Parameter.empty
OFFERED = ("base", "base_index", "layer_name", "rng")
"""Parameter names that are handed to a function by the evaluator, not taken from the user."""


@dataclass(frozen=True)
class Parameter:
    """One keyword of a method, as its signature declares it."""

    name: str
    """As users write it: `lambda`."""
    keyword: str
    """As the function declares it: `lambda_`, since Python keeps `lambda` to itself."""
    annotation: Any
    default: Any
    per_model: bool

    def check(self, value: Any, method: str) -> Any:
        """The value as the annotation's type; `value` is one model's for a per-model one.

        Raises
            ParameterError: of the wrong type, out of range or not finite.
        """
        if self.annotation is Any:
            return value
        try:
            checked = _adapter(self.annotation).validate_python(value)
        except ValidationError as error:
            reason = "; ".join(item["msg"] for item in error.errors())
            raise ParameterError(
                f"{method}: {self.name} can't be {value!r:.100}.", reason, fix=self._fix()
            ) from None
        self._check_finite(checked, method)
        return checked

    def _check_finite(self, value: Any, method: str) -> None:
        """Refuse a number that would make every result infinite or none. Raises ParameterError."""
        if isinstance(value, float) and not math.isfinite(value):
            raise ParameterError(
                f"{method}: {self.name} can't be {value!r}.",
                "it has to be a finite number",
                fix=f"'{self.name}: 1.0', or see 'distmerge methods {method}'",
            )

    def _fix(self) -> str:
        if self.default is REQUIRED:
            return f"'{self.name}: 0.5', or what 'distmerge methods' says it may be"
        return f"'{self.name}: {self.default!r}', or see 'distmerge methods'"


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


class _Told:
    """What help() and signature() say of a call: made when it is asked for, as what every call
    takes is known further up."""

    def __init__(self, doc: str | None = None) -> None:
        """doc: the class's own; None where this is the signature."""
        self._doc = doc

    def __get__(self, method: Any, owner: type) -> Any:
        if method is not None:
            from distmerge.expressions.call_help import call_doc, call_signature  # a door upward

            return (call_doc if self._doc else call_signature)(method.description)
        if self._doc is None:
            raise AttributeError(f"{owner.__name__} has the signature of any class")
        return self._doc


def told(kind: type[T]) -> type[T]:
    """Instances of this class say how they are called; each has a `description`, a method."""
    setattr(kind, "__doc__", _Told(kind.__doc__))  # noqa: B010
    setattr(kind, "__signature__", _Told())  # noqa: B010
    return kind


@told
@dataclass(frozen=True, eq=False)
class MergeMethod:
    """A registered function, and all that planning needs to know of it.

    Calling one merges: see `distmerge.expressions.calls.call_method` for what it takes.
    """

    name: str
    function: Callable[..., Any]
    parameters: Mapping[str, Parameter]
    inputs: tuple[str, ...] = ("models",)
    """Arguments that take one tensor from every model."""
    granularity: Granularity | Sight = "whole"
    takes_base: bool = False
    base_required: bool = False
    models: tuple[int, int | None] = (1, None)
    """Fewest and most models, the base not counted unless `counts_base`."""
    counts_base: bool = False
    """Is a base one of the models that are counted, as it is for slerp's two ends?"""
    from_call: Callable[..., dict[str, Any]] | None = None
    """Translates the keywords of a Python call into the recipe's parameters."""
    accepts_any: bool = False
    """Does the function take **kwargs?"""
    offered: frozenset[str] = field(default=frozenset())
    drops_unknown: bool = False
    """Does a call leave out keywords that the function doesn't declare?"""
    raw: bool = False
    """Does it take operands in the dtype they are stored in? See `distmerge.methods.operands`."""
    builtin: bool = False
    seamless: bool | Callable[[Mapping[str, Any]], bool] = False
    """Does it give the same bits however many blocks it is given at once, since it works on each
    element or each row by itself, and its questions are exact or can be cut into pieces? Can depend
    on the parameters."""

    def __post_init__(self) -> None:
        # What functools.update_wrapper would set, on a frozen instance.
        self.__dict__.update(__wrapped__=self.function, __name__=self.name)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        from distmerge.expressions.calls import call_method  # a door upward

        return call_method(self, *args, **keywords)

    def __repr__(self) -> str:
        return f"<merge method {self.name}>"

    def __reduce__(self) -> Any:
        if self.builtin:
            return _find, (self.name,)
        travels_as_code(self.function)
        state = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return _restore, (state,)

    @property
    def description(self) -> MergeMethod:
        """Itself, where a function of whole models has another one."""
        return self

    @property
    def generator(self) -> bool:
        """Does it yield questions?"""
        return inspect.isgeneratorfunction(self.function)

    @property
    def source_hash(self) -> str:
        """Changes with what the function does, as far as `distmerge.methods.source` can tell."""
        text = source_text(self.function, alone=self.builtin)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def invoke(
        self,
        inputs: Mapping[str, Sequence[Tensor]],
        base: Tensor | None,
        parameters: Mapping[str, Any],
        *,
        layer_name: str,
        base_index: int | None,
        draw: Draw | None = None,
    ) -> Any:
        """Call the function on blocks: a tensor, or a generator if it yields questions.

        Every list is fresh, so a function that pops from it harms nobody.
        """
        offers = {"layer_name": layer_name, "base_index": base_index, "rng": draw, "base": base}
        passed = {k: v for k, v in offers.items() if k in self.offered}
        if self.accepts_any:
            passed["layer_name"] = layer_name
        for name, value in parameters.items():
            declared = self.parameters.get(name)
            passed[declared.keyword if declared else name] = value
        arguments = {name: list(tensors) for name, tensors in inputs.items()}
        return self.function(**arguments, **passed)

    def sees(self, parameters: Mapping[str, Any], shape: tuple[int, ...]) -> Granularity:
        """What it must see at once of a tensor of this shape."""
        known = self.granularity
        return known if isinstance(known, str) else known(parameters, shape)

    def is_seamless(self, parameters: Mapping[str, Any]) -> bool:
        """Does the width of blocks make no difference with these parameters?"""
        if isinstance(self.seamless, bool):
            return self.seamless
        return self.seamless({n: p.default for n, p in self.parameters.items()} | {**parameters})

    def check_count(self, models: Sequence[object], base: object | None) -> None:
        """Refuse too few or too many models; `base` is not among them.

        Raises
            RecipeError: names them.
        """
        given = [*([] if base is None else [base]), *models]
        count = len(given) if self.counts_base else len(models)
        least, most = self.models
        if least <= count and (most is None or count <= most):
            return
        bounds = f"{least} to {most}" if most else f"at least {least}"
        wanted = str(least) if least == most else bounds
        noun = "model" if wanted.split()[-1] == "1" else "models"
        besides = "" if base is None or self.counts_base else " besides its base"
        raise RecipeError(
            f"{self.name} merges {wanted} {noun}{besides}, not {count}.",
            f"models: {', '.join(map(str, given))}",
            fix=f"list {wanted}, or choose another merge_method",
        )

    def check_parameters(self, given: Mapping[str, Any]) -> None:
        """Refuse unknown names.

        Raises
            ParameterError: names the nearest parameter.
        """
        if self.accepts_any:
            return
        for name in given:
            if name not in self.parameters:
                raise unknown_parameter(self, name)


def unknown_parameter(method: MergeMethod, name: str) -> ParameterError:
    """The error for a parameter that a method doesn't have, with the nearest it has."""
    known = list(method.parameters)
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return ParameterError(
        f"{method.name} has no parameter {name!r}.",
        f"it has: {', '.join(known) or 'none'}",
        fix=f"write '{near[0]}'" if near else f"leave {name!r} out",
    )


def _find(name: str) -> MergeMethod:
    from distmerge.methods.registry import find_method  # it is built of what is here

    return find_method(name)


def _restore(state: dict[str, Any]) -> MergeMethod:
    return MergeMethod(**state)
