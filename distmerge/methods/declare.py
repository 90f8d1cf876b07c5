"""The decorators that turn a function into a merge method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, overload

from distmerge.errors import MethodError
from distmerge.methods.blocks import Granularity
from distmerge.methods.method import MergeMethod, told
from distmerge.methods.signature import describe

Function = Callable[..., Any]


@overload
def layer_merge(function: Function, /) -> MergeMethod: ...
@overload
def layer_merge(
    *,
    blocks: bool | Granularity | None = None,
    name: str | None = None,
    models: tuple[int, int | None] = (1, None),
    from_call: Function | None = None,
) -> Callable[[Function], MergeMethod]: ...
def layer_merge(function: Function | None = None, /, **options: Any) -> Any:
    """Merge models layer by layer with a function of tensors.

    The first argument receives the list of one layer's tensors, in the order of the models. A
    function that declares `base` gets the base model's tensor there and the others in the list;
    one that doesn't finds the base in the list, and its place in `base_index` if it declares that.
    Other keywords are the method's parameters; `**kw` receives `layer_name`.

    Parameters
        blocks: True says that the function gives the same result on blocks of whole rows as on
            the whole tensor, "elements" on any run of elements; by default it sees whole tensors.
            A function that yields questions works on blocks of rows.
        name: what recipes call it; the function's name by default.
        models: fewest and most models, the base not counted.
        from_call: translates the keywords of a Python call into the parameters of the function.

    Raises
        MethodError: the signature can't be that of a merge method.
    """
    if function is not None:
        return describe(function)
    return lambda f: describe(f, **options)


def dict_map(names: Function | Iterable[str] | None = None) -> Any:
    """Apply a function of tensors to every key of the state dicts in a list.

    `@dict_map` maps the first argument; `@dict_map(["models", "fishers"])` several, each given
    a list of state dicts, by position or by name. The result is a `StateDict`. Keywords that the
    function doesn't declare are not passed to it.

    Raises
        MethodError: the function has no such argument.
    """
    if callable(names):
        return replace(describe(names), drops_unknown=True)
    if isinstance(names, str):
        raise MethodError(f"@dict_map({names!r}) needs a list.", fix=f"@dict_map([{names!r}])")
    if names is not None and not isinstance(names, Iterable):
        raise MethodError(f"@dict_map({names!r:.60}) needs a list.", fix="@dict_map(['models'])")
    inputs = None if names is None else tuple(names)
    return lambda function: replace(describe(function, inputs=inputs), drops_unknown=True)


@told
@dataclass(frozen=True, eq=False)
class ModelMethod:
    """A function of whole state dicts.

    It is called as a `MergeMethod` is (`distmerge.expressions.model_calls.call_model_method`), but
    computes at once, with every model in memory: recipes can't name it.
    """

    description: MergeMethod
    """What its signature says."""

    def __post_init__(self) -> None:
        described = self.description
        self.__dict__.update(__wrapped__=described.function, __name__=described.name)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        from distmerge.expressions.model_calls import call_model_method  # a door upward

        return call_model_method(self, *args, **keywords)

    def __repr__(self) -> str:
        return f"<model merge method {self.description.name}>"


def model_merge(function: Function) -> ModelMethod:
    """Merge models with a function of whole state dicts.

        @model_merge
        def average(models, **kw):
            return sum(models) / len(models)

    The first argument receives the list of `StateDict`s, whatever kind of models the call is
    given, under the base's spelling of their keys; the result, a dict of tensors, goes back in
    that kind. `base`, `base_index` and the method's parameters are passed as to a `@layer_merge`
    function; `**kw` receives what the call was given besides.

    Raises
        MethodError: the signature can't be that of a merge method.
    """
    return ModelMethod(describe(function))
