"""What the arguments of the public functions have to be: refused before anything is done.

An argument of one name takes the same values in every function; values that have checks of their
own (sizes, dtypes, models, recipes) are not here.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, StrictBool, StrictStr, TypeAdapter, ValidationError

from distmerge.errors import ParameterError


def _whole(value: Any) -> Any:
    """Whole numbers of numpy and torch as Python's."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return value
    try:
        return operator.index(value)
    except TypeError:  # arrays have it, too, whatever is in them
        return value


def _switch(value: Any) -> Any:
    """Truth values of numpy as Python's."""
    is_numpys = str(getattr(value, "dtype", "")) == "bool" and value.shape == ()
    return bool(value) if is_numpys else value


def _device(value: Any) -> Any:
    """torch's devices by name."""
    kind = type(value)
    return str(value) if f"{kind.__module__}.{kind.__name__}" == "torch.device" else value


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Place = Annotated[StrictStr, BeforeValidator(_text)]


class Kind(NamedTuple):
    """What an argument may be."""

    annotation: Any
    told: str
    """The same in words."""
    example: str
    secret: bool = False
    """Is the value kept out of messages?"""


_SWITCH = Kind(Annotated[StrictBool, BeforeValidator(_switch)], "True or False", "True")
_CALLED = Kind(Callable[..., Any], "a function, called with each event", "print")
KINDS: Mapping[str, Kind] = {
    "engine": Kind(StrictStr, "'local' or 'ray'", "'local'"),
    "address": Kind(StrictStr | None, "a Ray cluster's address, or None", "'auto'"),
    "workers": Kind(Whole | None, "a whole number, 1 or more, or None", "4"),
    "device": Kind(
        Annotated[
            StrictStr, Field(pattern=r"^(cpu|cuda(:[0-9]{1,3})?)$"), BeforeValidator(_device)
        ],
        "'cpu', 'cuda' or 'cuda:1'",
        "'cpu'",
    ),
    "seed": Kind(
        Annotated[Whole, Field(ge=0, lt=1 << 64)] | None,
        "a whole number from 0 to 2**64 - 1, or None",
        "0",
    ),
    "overwrite": _SWITCH,
    "allow_non_finite": _SWITCH,
    "pull_request": _SWITCH,
    "strict": _SWITCH,
    "out": Kind(Place, "a directory or URL", "'merged'"),
    "storage_options": Kind(
        Mapping[str, Any] | None, "a dict of fsspec's options, or None", "{}", secret=True
    ),
    "keep_intermediates": Kind(Place | None, "a directory or URL, or None", "'intermediates'"),
    "overrides": Kind(
        Sequence[StrictStr], "a list of 'path.to.key=value'", "['parameters.weight=0.4']"
    ),
    "listener": _CALLED,
    "told": Kind(_CALLED.annotation, "a function of results and what they are ranked by", "print"),
    "trials": Kind(Annotated[Whole, Field(ge=1)], "a whole number, 1 or more", "50"),
    "sampler": Kind(StrictStr, "a sampler's name", "'tpe'"),
    "pruner": Kind(StrictStr, "a pruner's name", "'none'"),
    "storage": Kind(
        StrictStr | None, "a database's URL, or None", "'sqlite:///study.db'", secret=True
    ),
    "scratch": Kind(Place | None, "a folder, 'none', or None", "'/scratch'"),
}


@functools.cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(KINDS[name].annotation)


def checked(function: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, those that are known here as their types.

    Raises
        ParameterError: one of another kind than it takes.
    """
    return {name: _checked(function, name, value) for name, value in given.items()}


def known_options(function: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Refuse what a function has no option for. Raises ParameterError."""
    import difflib

    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
            raise ParameterError(
                f"{function} has no option {name!r}.",
                f"it has: {', '.join(known)}",
                fix=f"write '{near[0]}='" if near else f"leave {name}= out",
            )


def _checked(function: str, name: str, value: Any) -> Any:
    kind = KINDS.get(name)
    if kind is None:
        return value
    try:
        found = _adapter(name).validate_python(value)
    except ValidationError:
        shown = f"a {type(value).__name__}" if kind.secret else f"{value!r:.60}"
        raise ParameterError(
            f"{function}: {name} can't be {shown}.",
            f"it is {kind.told}",
            fix=f"{name}={kind.example}",
        ) from None
    # pydantic makes copies of lists and dicts, which may be of a kind of their own.
    return value if isinstance(value, Mapping | Sequence) else found
