"""The boundary between a recipe and its expression.

Roles are settled from names alone; then the models are opened, all at the same time, and the
sections become nodes: one for the whole model, or one for each slice and module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from distmerge.checkpoints.location import Location
from distmerge.checkpoints.store import StorageOptions
from distmerge.checkpoints.tensors import Checkpoint
from distmerge.errors import shown
from distmerge.expressions.lazy import LazyStateDict
from distmerge.expressions.model_ref import ModelRef
from distmerge.expressions.nodes import Expression, Leaf, leaves
from distmerge.expressions.recipe import Recipe
from distmerge.expressions.recipe_chat import in_one_template
from distmerge.expressions.recipe_formula import Formula
from distmerge.expressions.recipe_formula_build import (
    build_formula,
    check_formula,
    unknown_model,
)
from distmerge.expressions.recipe_opening import name_leaves, pin_models
from distmerge.expressions.recipe_roles import Roles, assign_roles
from distmerge.expressions.recipe_slices import Models, build_parts
from distmerge.expressions.recipe_tokenizer import Misspelt, check_names, near_names
from distmerge.expressions.recipe_vocabulary import InOneVocabulary, in_one_vocabulary
from distmerge.expressions.request import MergeRequest, warnings_of

_WRITTEN = ("dtype", "out_dtype", "config_from", "tokenizer", "tokenizer_source", "chat_template")
"""Keys that say how a merge is written, not what it is."""
Parts = tuple[tuple[str | None, tuple[Roles, ...]], ...]


@dataclass(frozen=True)
class Settled:
    """A recipe whose roles are known, before any model is opened."""

    recipe: Recipe
    parts: Parts
    """Each module's sections, by its name; None for the whole model."""
    nested: Mapping[str, Settled]
    """The recipes that it names as models."""

    @property
    def donor(self) -> ModelRef:
        """The base, else the first model named."""
        return self.recipe.base_model or next(iter(self.models()))

    def models(self) -> Iterator[ModelRef]:
        """Every model that is listed, in the recipe's order."""
        yield from self.recipe.in_formula()
        for part in self.recipe.parts():
            for section in part.sections:
                yield from (source.model for source in section.sources)

    @cached_property
    def named(self) -> list[ModelRef]:
        """Every model that is opened, once, those of nested recipes too."""
        found = list(self.models())  # a base that a method takes apart is listed too, perhaps
        found += [self.recipe.config_from] if self.recipe.config_from else []
        found += map(self.meant, self.recipe.vocabulary.models()) if self.recipe.vocabulary else []
        own = [ref for ref in found if ref.path not in self.nested]
        inner = [ref for nested in self.nested.values() for ref in nested.named]
        return list(dict.fromkeys([*self.merged, *own, *inner]))

    @cached_property
    def merged(self) -> list[ModelRef]:
        """The models whose weights are read, each once, the donor first."""
        found = [self.donor, *(ref for _, part in self.parts for r in part for ref in r.named())]
        found += self.recipe.in_formula()
        every = [
            self.nested[ref.path].merged if ref.path in self.nested else [ref] for ref in found
        ]
        return list(dict.fromkeys(ref for refs in every for ref in refs))

    def meant(self, ref: ModelRef) -> ModelRef:
        """The model of a name: a formula's name may be short for one."""
        return self.recipe.names.get(ref.path) or ref

    def near_names(self) -> dict[Location, Misspelt]:
        """Tokenizers' models with nearly the name of another."""
        section = self.recipe.vocabulary
        merged = {ref.path for ref in self.merged} if section else set()
        return near_names(section, self.recipe.document, merged) if section else {}

    @cached_property
    def every_nested(self) -> dict[str, Settled]:
        """The recipes that it needs, by name, those that others need first."""
        found: dict[str, Settled] = {}
        for name, inner in self.nested.items():
            found |= {**inner.every_nested, name: inner}
        return found

    @cached_property
    def warnings(self) -> list[str]:
        """Each once."""
        found = list(self.recipe.warnings)
        found += [text for _, part in self.parts for roles in part for text in roles.warnings]
        for name, inner in self.nested.items():
            found += inner.warnings
            found += _only_for_files(name, inner.recipe)
        return list(dict.fromkeys(map(shown, found)))


def _only_for_files(name: str, nested: Recipe) -> list[str]:
    """Keys of a nested recipe that say how it is written."""
    keys = [key for key in _WRITTEN if nested.document.data.get(key)]
    if not keys:
        return []
    where = nested.document.where((keys[0],))
    return [f"{where}: {' and '.join(keys)} of {name!r} count only with --keep-intermediates."]


def build_request(recipe: Recipe, storage_options: StorageOptions) -> MergeRequest:
    """See `Recipe.request`."""
    settled = settle(recipe)
    pinned = pin_models(settled.named, storage_options, settled.near_names())
    return request_of(settled, pinned, storage_options)


def request_of(
    settled: Settled, pinned: Mapping[Location, Checkpoint], storage_options: StorageOptions
) -> MergeRequest:
    """The request of a recipe whose models, and perhaps others, are open. Raises
    ParameterError."""
    opened = name_leaves(settled.named, pinned)
    inner = {
        name: replace(_request(nested, opened, storage_options), warnings=())
        for name, nested in settled.every_nested.items()
    }
    request = _request(settled, opened, storage_options)
    return replace(request, intermediates=tuple(inner.items()))


def _request(
    settled: Settled, opened: Mapping[Location, Leaf], storage_options: StorageOptions
) -> MergeRequest:
    recipe = settled.recipe
    asked = _in_one_vocabulary(settled, opened, storage_options) if recipe.vocabulary else None
    opened = asked.opened if asked else opened
    donor = _leaf(settled, settled.donor, opened)
    if recipe.formula is not None:
        built = _evaluated(recipe, recipe.formula, _models(settled, opened, donor)).request()
        root, donor = built.root, built.donor or donor
    else:
        root = _expression(settled, opened, donor)
        used = leaves(root)
        if donor not in used:  # then the first model's spelling of keys is the output's
            assert isinstance(used[0], Leaf)
            root = _expression(settled, opened, used[0])
    named = recipe.config_from
    config_from = _leaf(settled, named, opened) if named else None
    tokenizer, told = asked.tokenizer if asked else None, asked.warnings if asked else ()
    if recipe.chat_template:
        tokenizer, more = in_one_template(
            recipe.chat_template,
            recipe.document.where(("chat_template",)),
            tokenizer,
            merged=[opened[at] for at in dict.fromkeys(ref.location for ref in settled.merged)],
            donor=config_from or donor,
            options=storage_options,
        )
        told = (*told, *more)
    idle = (*(asked.warnings if asked else ()), *warnings_of(root))
    return MergeRequest(
        root,
        donor=donor,
        config_from=config_from,
        out_dtype=recipe.out_dtype or recipe.dtype,
        seed=recipe.seed,
        on_unequal=recipe.on_unequal,
        on_shape_mismatch=recipe.on_shape_mismatch,
        tokenizer=tokenizer,
        recipe_text=recipe.text,
        warnings=(*settled.warnings, *told, *warnings_of(root)),
        without_effect=idle,
        storage_options=storage_options,
    )


def _in_one_vocabulary(
    settled: Settled, opened: Mapping[Location, Leaf], storage_options: StorageOptions
) -> InOneVocabulary:
    section, config_from = settled.recipe.vocabulary, settled.recipe.config_from
    assert section is not None
    return in_one_vocabulary(
        section,
        lambda ref: opened[settled.meant(ref).location],
        opened,
        merged=list(dict.fromkeys(ref.location for ref in settled.merged)),
        config_from=config_from.location if config_from else None,
        options=storage_options,
    )


def settle(recipe: Recipe, known: dict[str, Settled] | None = None) -> Settled:
    """Settle the roles of a recipe and of those nested in it. Raises what `assign_roles` does.

    known: nested ones that are settled, by name; what is shared is settled once.
    """
    known = {} if known is None else known
    parts = tuple(
        (part.name, tuple(assign_roles(recipe, section) for section in part.sections))
        for part in recipe.parts()
    )
    for name, inner in recipe.nested.items():
        if name not in known:
            known[name] = settle(inner, known)
    settled = Settled(recipe, parts, {name: known[name] for name in recipe.nested})
    _check_names(settled)
    return settled


def _leaf(settled: Settled, ref: ModelRef, opened: Mapping[Location, Leaf]) -> Leaf:
    """The checkpoint that a name means; for a nested recipe its donor."""
    inner = settled.nested.get(ref.path)
    return opened[ref.location] if inner is None else _leaf(inner, inner.donor, opened)


def _expression(settled: Settled, opened: Mapping[Location, Leaf], reference: Leaf) -> Expression:
    """reference: the model whose spelling of keys is the output's."""
    return _built(settled.recipe, settled.parts, _models(settled, opened, reference), reference)


def _models(settled: Settled, opened: Mapping[Location, Leaf], reference: Leaf) -> Models:
    """What names in a recipe stand for; a document is one node for all that use it."""
    nested: dict[str, Expression] = {}

    def model(ref: ModelRef) -> Expression:
        return nested[ref.path] if ref.path in nested else opened[ref.location]

    for name, inner in settled.every_nested.items():
        nested[name] = _built(inner.recipe, inner.parts, model, reference)
    return model


def _built(recipe: Recipe, parts: Parts, model: Models, reference: Leaf) -> Expression:
    if recipe.formula is not None:
        return _evaluated(recipe, recipe.formula, model).expression
    return build_parts(recipe, parts, model, reference)


def _evaluated(recipe: Recipe, formula: Formula, model: Models) -> LazyStateDict:
    """What the formula of a recipe builds."""
    refs = zip(formula.models(), recipe.in_formula(), strict=True)
    made = {name: LazyStateDict(model(ref)) for name, ref in refs}
    return build_formula(formula, made.__getitem__, recipe.on_missing)


def _check_names(settled: Settled) -> None:
    if (section := settled.recipe.vocabulary) is not None:
        remote = {ref.path: ref.location.bare for ref in settled.merged}
        remote.update(dict.fromkeys(settled.recipe.names, False))
        check_names(section, settled.recipe.document, remote)
    formula = settled.recipe.formula
    known = [*settled.recipe.names, *settled.nested]
    for name in formula.models() if formula else ():
        assert formula is not None
        if name not in known:
            raise unknown_model(formula, name, known)
    if formula is not None and not formula.models():
        raise formula.error(formula.tree, "it names no model", fix="merge: 0.5 * a + 0.5 * b")
    if formula is not None:
        check_formula(formula, settled.recipe.on_missing)
