"""What a recipe merges with what: lists of models, slices of their layers, modules of them.

Whatever form it has, a recipe is a few sections, each of which merges some models with one
another, under parameters of several levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from distmerge.expressions.model_ref import ModelRef
from distmerge.expressions.yaml_lines import KeyPath


def nothing_as(empty: type[Any]) -> BeforeValidator:
    """`key:` without a value asks for nothing."""
    return BeforeValidator(lambda given: empty() if given is None else given)


Parameters = Annotated[dict[str, Any], nothing_as(dict)]


class Source(BaseModel):
    """One of the models to merge."""

    model_config = ConfigDict(frozen=True)

    model: ModelRef
    parameters: Parameters = {}
    inputs: dict[str, ModelRef] = {}
    """Further checkpoints beside this model, for a method that takes them (fisher's)."""
    layer_range: tuple[int, int] | None = None
    """In slices: the first layer, and the one after the last; None for all."""

    @model_validator(mode="before")
    @classmethod
    def _unwrap(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("rename") is not None:
            own = {"model": given.get("model"), "rename": given["rename"]}
            return {**{k: v for k, v in given.items() if k != "rename"}, "model": own}
        return {"model": given} if isinstance(given, str) else given


class Slice(BaseModel):
    """Some layers of the output."""

    model_config = ConfigDict(frozen=True)

    sources: tuple[Source, ...]
    base_model: ModelRef | None = None
    """Instead of the recipe's."""
    parameters: Parameters = {}


Sources = Annotated[tuple[Source, ...], nothing_as(tuple)]
Slices = Annotated[tuple[Slice, ...], nothing_as(tuple)]


class Module(BaseModel):
    """One module of the output: a tower, an encoder."""

    model_config = ConfigDict(frozen=True)

    models: Sources = ()
    slices: Slices = ()
    parameters: Parameters = {}


Modules = Annotated[dict[str, Module], nothing_as(dict)]


@dataclass(frozen=True)
class Section:
    """Models that are merged with one another."""

    sources: tuple[Source, ...]
    path: KeyPath
    """Where the list of them stands."""
    levels: tuple[KeyPath, ...]
    """Where parameters stand that hold for all of them, what counts most first."""
    base_model: ModelRef | None
    is_slice: bool = False

    @property
    def places(self) -> list[KeyPath]:
        """Where each model stands."""
        return [(*self.path, i) for i in range(len(self.sources))]


@dataclass(frozen=True)
class Part:
    """One module, or the whole model: the sections that it is stacked of."""

    name: str | None
    sections: tuple[Section, ...]


def parts_of(
    models: tuple[Source, ...],
    slices: tuple[Slice, ...],
    modules: Mapping[str, Module],
    base_model: ModelRef | None,
) -> list[Part]:
    """A recipe's modules, or the one that is the whole model."""
    if not modules:
        return [Part(None, tuple(_sections(models, slices, (), ((),), base_model)))]
    return [
        Part(
            name,
            tuple(
                _sections(
                    module.models,
                    module.slices,
                    ("modules", name),
                    (("modules", name), ()),
                    base_model,
                )
            ),
        )
        for name, module in modules.items()
    ]


def _sections(
    models: tuple[Source, ...],
    slices: tuple[Slice, ...],
    place: KeyPath,
    levels: tuple[KeyPath, ...],
    base_model: ModelRef | None,
) -> Iterator[Section]:
    if not slices:
        yield Section(models, (*place, "models"), levels, base_model)
    for i, one in enumerate(slices):
        at = (*place, "slices", i)
        base = one.base_model or base_model
        yield Section(one.sources, (*at, "sources"), (at, *levels), base, is_slice=True)


def with_inputs(value: Any, further: Sequence[str]) -> Any:
    """`fishers: url` beside `model:` is an input, where the method has one of that name."""
    if isinstance(value, list):
        return [with_inputs(item, further) for item in value]
    if not isinstance(value, dict):
        return value
    inputs = {key: value[key] for key in further if key in value}
    if "model" in value and inputs:
        return {**{k: v for k, v in value.items() if k not in inputs}, "inputs": inputs}
    return {key: with_inputs(kept, further) for key, kept in value.items()}
