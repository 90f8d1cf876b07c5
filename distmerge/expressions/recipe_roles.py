"""Who is the base, who is merged, and with which parameters: settled from names alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distmerge.errors import ParameterError, RecipeError
from distmerge.expressions.model_ref import ModelRef
from distmerge.expressions.recipe import Recipe
from distmerge.expressions.recipe_sources import Section
from distmerge.expressions.recipe_values import Values, combine
from distmerge.methods.method import REQUIRED

LayerRange = tuple[int, int]


@dataclass(frozen=True)
class Member:
    """One of the models that are merged, and what the recipe says of it."""

    model: ModelRef
    values: Values = field(default_factory=dict)
    inputs: Mapping[str, ModelRef] = field(default_factory=dict)
    layers: LayerRange | None = None
    """Of a slice; None for all."""


@dataclass
class Roles:
    """Who is what in a section."""

    section: Section
    members: list[Member]
    """Models that the method combines, without a base that it takes apart."""
    base: ModelRef | None = None
    """For a method that takes its base apart."""
    base_layers: LayerRange | None = None
    base_index: int = 0
    """Where the base stands, or stood, among the models."""
    base_listed: bool = False
    """Is the base one of the members?"""
    warnings: list[str] = field(default_factory=list)

    def named(self) -> Iterator[ModelRef]:
        """Every model, the base first."""
        if self.base is not None:
            yield self.base
        for member in self.members:
            yield member.model
            yield from member.inputs.values()


def assign_roles(recipe: Recipe, section: Section) -> Roles:
    """Tell the base from the models, as mergekit does.

    A method that takes its base apart has it dropped from the models. Any other merges it as one
    of them: where it is listed, else at the end, if its parameters are known; else it is only the
    donor of config, tokenizer and dtypes. A slice merges no other model than its sources.

    Raises
        RecipeError: too few or too many models, one given twice, no base.
        CheckpointNotFound: a path where nothing is.
    """
    base = section.base_model
    places = _places(recipe, section)
    base_at = places.get(recipe.identity(base)) if base else None
    members = [
        Member(source.model, recipe.values(*section.path, i), source.inputs, source.layer_range)
        for i, source in enumerate(section.sources)
    ]
    roles = Roles(section, members, base_index=base_at or 0)
    if recipe.method.takes_base:
        _take_base_apart(recipe, roles, base_at)
    elif base is not None:
        added = base_at is None and not section.is_slice and _merge_base_too(recipe, roles, base)
        roles.base_listed = base_at is not None or added
    if not roles.members and base_at is not None and _may_be_alone(recipe):
        where = recipe.document.where(section.path)
        roles.warnings.append(f"{where}: {base}, the base, has nothing beside it: it is copied.")
        return roles
    _check_count(recipe, roles)
    _check_inputs(recipe, roles)
    return roles


def _may_be_alone(recipe: Recipe) -> bool:
    """Does a base without models have a result, itself, as in mergekit? Of sums of differences
    from it, that is."""
    method = recipe.method
    return method.builtin and method.base_required and method.models == (1, None)


def parameters_of(recipe: Recipe, roles: Roles) -> dict[str, Any]:
    """Parameters as `Apply` takes them: a tuple over the models for per-model ones."""
    members, general = roles.members, _general(recipe, roles.section)
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


def _general(recipe: Recipe, section: Section) -> Values:
    """What holds for all models of a section: the slice's, the module's, the recipe's."""
    levels = [recipe.values(*level) for level in section.levels]
    names = dict.fromkeys(name for level in reversed(levels) for name in level)
    return {name: combine([level.get(name) for level in levels]) for name in names}


def _places(recipe: Recipe, section: Section) -> dict[object, int]:
    """Where each model stands in the list. Raises RecipeError for one that is listed twice."""
    found: dict[object, int] = {}
    seen: dict[object, int] = {}
    for i, source in enumerate(section.sources):
        identity = recipe.identity(source.model)
        first = seen.setdefault((identity, source.layer_range), i)
        found.setdefault(identity, i)
        if first != i:
            raise RecipeError(
                f"{source.model} is listed twice among the models.",
                *(recipe.document.where((*section.path, place)) for place in (first, i)),
                fix="list it once, with its weights added up",
            )
    return found


def _take_base_apart(recipe: Recipe, roles: Roles, base_at: int | None) -> None:
    method, roles.base = recipe.method, roles.section.base_model
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
        roles.base_layers = dropped.layers
        if dropped.values:
            where = recipe.document.where((*roles.section.path, base_at, "parameters"))
            names = ", ".join(dropped.values)
            roles.warnings.append(f"{where}: {names} of {dropped.model} is ignored: the base.")
    elif roles.section.is_slice:
        roles.base_layers = _layers_of_base(recipe, roles)


def _layers_of_base(recipe: Recipe, roles: Roles) -> LayerRange | None:
    ranges = {member.layers for member in roles.members}
    if len(ranges) == 1:
        return ranges.pop()
    raise RecipeError(
        f"{recipe.document.where(roles.section.path)}: which layers of {roles.base} are the base "
        "of this slice?",
        "its sources take different ones, and the base is not among them",
        fix=f"add the base to 'sources:': {{model: {roles.base}, layer_range: [...]}}",
    )


def _merge_base_too(recipe: Recipe, roles: Roles, base: ModelRef) -> bool:
    """Add a base that isn't listed, if all is known that the method asks of a model."""
    method, given = recipe.method, _general(recipe, roles.section)
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
    if not roles.section.sources and roles.base is None:
        raise RecipeError(
            f"{recipe.document.origin} names no models.",
            fix="models: [{model: org/name}, {model: org/other}]",
        )
    try:
        recipe.method.check_count([member.model for member in roles.members], roles.base)
    except RecipeError as error:
        if not roles.section.is_slice:
            raise
        where = recipe.document.where(roles.section.path)
        raise RecipeError(error.headline, *error.facts, where, fix=error.fix) from None


def _check_inputs(recipe: Recipe, roles: Roles) -> None:
    for name in recipe.method.inputs[1:]:
        lacking = [str(member.model) for member in roles.members if name not in member.inputs]
        if lacking:
            raise RecipeError(
                f"{recipe.method.name} needs {name!r} for each model.",
                f"nothing gives it for {', '.join(lacking)}",
                fix=f"models: [{{model: {lacking[0]}, {name}: path/of/its/{name}}}]",
            )


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
    meant = f"write {name!r}"
    ignored = [i.text for i in recipe.ignored if i.path[-1] == name or i.fix.startswith(meant)]
    whom = [f"nothing gives it for {', '.join(lacking)}"] if lacking else []
    example = 1.0 if name == "weight" else 0.5
    fix = f"parameters: {{{name}: {example}}}" + (", with each model or for all" if lacking else "")
    raise ParameterError(f"{recipe.method.name} needs {name!r}.", *whom, *ignored, fix=fix)
