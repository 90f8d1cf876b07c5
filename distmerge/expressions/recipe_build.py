"""The boundary between a recipe and its expression: who is the base, who is merged, with what.

Roles are settled from names alone; then the models are opened, all at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from distmerge.checkpoints.location import Location
from distmerge.checkpoints.opening import open_checkpoint
from distmerge.checkpoints.storage_options import options_for
from distmerge.checkpoints.store import StorageOptions
from distmerge.checkpoints.tensors import Checkpoint
from distmerge.errors import ParameterError, RecipeError
from distmerge.expressions.model_ref import ModelRef
from distmerge.expressions.nodes import Apply, Leaf, short_name
from distmerge.expressions.recipe import Recipe
from distmerge.expressions.recipe_values import Values, combine
from distmerge.expressions.request import MergeRequest
from distmerge.methods.method import REQUIRED

_MODELS_AT_ONCE = 8


@dataclass(frozen=True)
class Member:
    """One of the models that are merged, and what the recipe says of it."""

    model: ModelRef
    values: Values = field(default_factory=dict)
    inputs: Mapping[str, ModelRef] = field(default_factory=dict)


@dataclass
class Roles:
    """Who is what in a merge."""

    members: list[Member]
    """Models that the method combines, without a base that it takes apart."""
    base: ModelRef | None = None
    """For a method that takes its base apart."""
    base_index: int = 0
    """Where the base stands, or stood, among the models."""
    base_listed: bool = False
    """Is the base one of the members?"""
    warnings: list[str] = field(default_factory=list)


def build_request(recipe: Recipe, storage_options: StorageOptions) -> MergeRequest:
    """See `Recipe.request`."""
    roles = assign_roles(recipe)
    parameters = _parameters(recipe, roles.members)
    donor = recipe.base_model or recipe.models[0].model
    named = [donor, *([roles.base] if roles.base else []), *_named(roles.members)]
    named += [recipe.config_from] if recipe.config_from else []
    leaves = open_leaves(named, storage_options)
    extra = recipe.method.inputs[1:]
    members = [leaves[member.model.location] for member in roles.members]
    root = Apply(
        recipe.method,
        (
            (recipe.method.inputs[0], tuple(members)),
            *((n, tuple(leaves[m.inputs[n].location] for m in roles.members)) for n in extra),
        ),
        base=leaves[roles.base.location] if roles.base else None,
        base_index=roles.base_index,
        parameters=tuple(parameters.items()),
        on_missing=recipe.on_missing,
        passthrough=frozenset(recipe.passthrough),
        base_listed=roles.base_listed,
    )
    return MergeRequest(
        root,
        donor=leaves[donor.location],
        config_from=leaves[recipe.config_from.location] if recipe.config_from else None,
        out_dtype=recipe.out_dtype or recipe.dtype,
        seed=recipe.seed,
        on_unequal=recipe.on_unequal,
        recipe_text=recipe.text,
        warnings=(*recipe.warnings, *roles.warnings),
        storage_options=storage_options,
    )


def assign_roles(recipe: Recipe) -> Roles:
    """Tell the base from the models, as mergekit does.

    A method that takes its base apart has it dropped from the models. Any other merges it as one
    of them: where it is listed, else at the end, if its parameters are known; else it is only the
    donor of config, tokenizer and dtypes.

    Raises
        RecipeError: too few or too many models, one given twice, no base.
        CheckpointNotFound: a path where nothing is.
    """
    places = _places(recipe)
    base = recipe.base_model
    base_at = places.get(base.location) if base else None
    members = [
        Member(source.model, recipe.values(i), source.inputs)
        for i, source in enumerate(recipe.models)
    ]
    roles = Roles(members, base_index=base_at or 0)
    if recipe.method.takes_base:
        _take_base_apart(recipe, roles, base_at)
    elif base is not None:
        roles.base_listed = base_at is not None or _merge_base_too(recipe, roles, base)
    _check_count(recipe, roles)
    _check_inputs(recipe, roles)
    return roles


def open_leaves(
    models: Iterable[ModelRef], storage_options: StorageOptions
) -> dict[Location, Leaf]:
    """Open each model once, at the same time, and name them apart. Raises the first's error."""
    unique = {model.location: model for model in reversed(list(models))}

    def pin(model: ModelRef) -> Checkpoint:
        options = options_for(model.path, storage_options)
        return open_checkpoint(model.path, revision=model.revision, storage_options=options)

    with ThreadPoolExecutor(_MODELS_AT_ONCE, thread_name_prefix="distmerge-open") as pool:
        opened = dict(zip(unique, pool.map(pin, unique.values()), strict=True))
    short = [short_name(checkpoint.url) for checkpoint in opened.values()]
    return {
        location: Leaf.of(checkpoint, checkpoint.url if short.count(name) > 1 else name)
        for (location, checkpoint), name in zip(opened.items(), short, strict=True)
    }


def _places(recipe: Recipe) -> dict[Location, int]:
    """Where each model stands in the list. Raises RecipeError for one that is listed twice."""
    found: dict[Location, int] = {}
    for i, source in enumerate(recipe.models):
        first = found.setdefault(source.model.location, i)
        if first != i:
            raise RecipeError(
                f"{source.model} is listed twice among the models.",
                *(recipe.document.where(("models", place)) for place in (first, i)),
                fix="list it once, with its weights added up",
            )
    return found


def _take_base_apart(recipe: Recipe, roles: Roles, base_at: int | None) -> None:
    method, roles.base = recipe.method, recipe.base_model
    if roles.base is None:
        if method.base_required:
            raise RecipeError(
                f"{method.name} needs a base_model.",
                recipe.document.where(("merge_method",)),
                fix="base_model: the model that the others were fine-tuned from",
            )
        if method.counts_base and roles.members:
            first, name = roles.members[0].model, method.name
            roles.warnings.append(f"{name} has no base_model: {first}, the first, is at t = 0.")
    elif base_at is not None:
        dropped = roles.members.pop(base_at)
        if dropped.values:
            where = recipe.document.where(("models", base_at, "parameters"))
            names = ", ".join(dropped.values)
            roles.warnings.append(f"{where}: {names} of {dropped.model} is ignored: the base.")


def _merge_base_too(recipe: Recipe, roles: Roles, base: ModelRef) -> bool:
    """Add a base that isn't listed, if all is known that the method asks of a model."""
    method, given = recipe.method, recipe.values()
    required = [p for p in method.parameters.values() if p.per_model and p.default is REQUIRED]
    lacking = [p.name for p in required if p.name not in given] + list(method.inputs[1:])
    if lacking:
        where = recipe.document.where(("base_model",))
        roles.warnings.append(
            f"{where}: {base} is not merged, since it is not listed with its {lacking[0]}; "
            "it gives config, tokenizer and dtypes."
        )
        return False
    roles.base_index = len(roles.members)
    roles.members.append(Member(base))
    return True


def _check_count(recipe: Recipe, roles: Roles) -> None:
    if not recipe.models and roles.base is None:
        raise RecipeError(
            f"{recipe.document.origin} names no models.",
            fix="models: [{model: org/name}, {model: org/other}]",
        )
    recipe.method.check_count([member.model for member in roles.members], roles.base)


def _check_inputs(recipe: Recipe, roles: Roles) -> None:
    for name in recipe.method.inputs[1:]:
        lacking = [str(member.model) for member in roles.members if name not in member.inputs]
        if lacking:
            raise RecipeError(
                f"{recipe.method.name} needs {name!r} for each model.",
                f"nothing gives it for {', '.join(lacking)}",
                fix=f"models: [{{model: {lacking[0]}, {name}: path/of/its/{name}}}]",
            )


def _parameters(recipe: Recipe, members: Sequence[Member]) -> dict[str, Any]:
    """Parameters as `Apply` takes them: a tuple over the models for per-model ones."""
    general = dict(recipe.values())
    if recipe.over is not None:
        general["over"] = _scope(recipe, general)
    result: dict[str, Any] = {}
    names = dict.fromkeys([*recipe.method.parameters, *general])
    names |= dict.fromkeys(name for member in members for name in member.values)
    for name in names:
        declared = recipe.method.parameters.get(name)
        own = [member.values.get(name) for member in members]
        value: Any = general.get(name)
        if any(v is not None for v in own) or (declared is not None and declared.per_model):
            value = tuple(combine([v, general.get(name)]) for v in own)
        given = value is not None and not (isinstance(value, tuple) and set(value) == {None})
        if declared is not None and declared.default is REQUIRED:
            _check_given(recipe, name, members, value)
        if given:
            result[name] = value
    return result


def _scope(recipe: Recipe, general: Values) -> str:
    where = recipe.document.where(("over",))
    if "over" not in recipe.method.parameters:
        raise ParameterError(
            f"{recipe.method.name} has no parameter 'over': it asks nothing of whole models.",
            where,
            fix="leave 'over' out",
        )
    if general.get("over", recipe.over) != recipe.over:
        raise ParameterError("'over' is given twice, differently.", where, fix="give it once")
    assert recipe.over is not None
    return recipe.over


def _check_given(recipe: Recipe, name: str, members: Sequence[Member], value: Any) -> None:
    lacking: list[str] = []
    if isinstance(value, tuple):
        pairs = zip(members, value, strict=True)
        lacking = [str(member.model) for member, own in pairs if own is None]
        if not lacking:
            return
    elif value is not None:
        return
    ignored = [i.text for i in recipe.ignored if i.path[-1] == name]
    whom = [f"nothing gives it for {', '.join(lacking)}"] if lacking else []
    example = 1.0 if name == "weight" else 0.5
    fix = f"parameters: {{{name}: {example}}}" + (", with each model or for all" if lacking else "")
    raise ParameterError(f"{recipe.method.name} needs {name!r}.", *whom, *ignored, fix=fix)


def _named(members: Iterable[Member]) -> Iterable[ModelRef]:
    for member in members:
        yield member.model
        yield from member.inputs.values()
