"""The boundary between the models that recipes name and the headers of their files: each is opened
once, all at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from distmerge.checkpoints.location import Location
from distmerge.checkpoints.opening import open_checkpoint
from distmerge.checkpoints.renaming import Rule
from distmerge.checkpoints.store import StorageOptions
from distmerge.checkpoints.tensors import Checkpoint
from distmerge.errors import DistmergeError, RecipeError
from distmerge.expressions.model_ref import ModelRef
from distmerge.expressions.nodes import Leaf, name_of
from distmerge.expressions.recipe_tokenizer import Misspelt

_MODELS_AT_ONCE = 8


def pin_models(
    models: Iterable[ModelRef],
    storage_options: StorageOptions,
    near: Mapping[Location, Misspelt] | None = None,
) -> dict[Location, Checkpoint]:
    """Open each model once, all at the same time. Raises the first's error, and RecipeError for
    one that is renamed in two ways.

    near: names that may be misspelt, which the errors tell.
    """
    models = list(models)
    unique, rules = _unique(models), _rules(models)

    def pin(model: ModelRef) -> Checkpoint:
        try:
            return open_checkpoint(
                model.path,
                revision=model.revision,
                adapter=model.location.adapter,
                rename=rules.get(model.location, ()),
                storage_options=storage_options,
            )
        except DistmergeError as error:
            if near and model.location in near:
                raise near[model.location].told(error) from error
            raise

    with ThreadPoolExecutor(_MODELS_AT_ONCE, thread_name_prefix="distmerge-open") as pool:
        return dict(zip(unique, pool.map(pin, unique.values()), strict=True))


def _rules(models: Iterable[ModelRef]) -> dict[Location, tuple[Rule, ...]]:
    """How each model is renamed: what is said of it anywhere holds wherever it is named."""
    found: dict[Location, tuple[Rule, ...]] = {}
    for model in models:
        if model.rename and found.setdefault(model.location, model.rename) != model.rename:
            raise RecipeError(
                f"{model} is renamed in two ways.",
                fix="write its rename once, or the same rules each time",
            )
    return found


def name_leaves(
    models: Iterable[ModelRef], pinned: Mapping[Location, Checkpoint]
) -> dict[Location, Leaf]:
    """A leaf for each of a recipe's models, whose short names are told apart by their places."""
    opened = {location: pinned[location] for location in _unique(models)}
    short = [name_of(checkpoint) for checkpoint in opened.values()]
    return {
        location: Leaf.of(checkpoint, checkpoint.url if short.count(name) > 1 else name)
        for (location, checkpoint), name in zip(opened.items(), short, strict=True)
    }


def _unique(models: Iterable[ModelRef]) -> dict[Location, ModelRef]:
    return {model.location: model for model in reversed(list(models))}
