"""The boundary between the slices and modules of a recipe and nodes that renumber layers.

What is a layer and what is a module is read off the names in the files: those of the model whose
spelling the output has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distmerge.errors import RecipeError
from distmerge.expressions.layers import Move, counted_in, main_families
from distmerge.expressions.model_ref import ModelRef
from distmerge.expressions.nodes import (
    Apply,
    Branch,
    Expression,
    Leaf,
    Renumber,
    Stack,
    children,
)
from distmerge.expressions.recipe import Recipe
from distmerge.expressions.recipe_modules import prefixes_of
from distmerge.expressions.recipe_roles import LayerRange, Roles, parameters_of

Models = Callable[[ModelRef], Expression]
_View = Callable[[ModelRef, LayerRange | None], Expression]


def build_parts(
    recipe: Recipe,
    parts: Sequence[tuple[str | None, Sequence[Roles]]],
    model: Models,
    reference: Leaf,
) -> Expression:
    """The expression of all sections.

    model: what a name in the recipe stands for.
    reference: the model whose spelling of keys is the output's.

    Raises
        RecipeError: layers that can't be told apart, ranges of unequal length, unknown modules.
    """
    names = [name for name, _ in parts if name is not None]
    if not names:
        return _Builder(recipe, model, reference).build(parts[0][1])
    prefixes = prefixes_of(names, reference.checkpoint.tensors, recipe.document)
    built = [
        _Builder(recipe, model, reference, own).build(part)
        for own, (_, part) in zip(prefixes, parts, strict=True)
    ]
    return Branch(tuple(built), tuple(prefixes))


@dataclass(frozen=True)
class _Builder:
    """Builds one module, or the whole model."""

    recipe: Recipe
    model: Models
    reference: Leaf
    prefixes: tuple[str, ...] = ("",)

    def build(self, part: Sequence[Roles]) -> Expression:
        if len(part) == 1 and self._is_whole(part[0]):
            return self._apply(part[0], lambda ref, _: self.model(ref))
        family = self._family(part[0])
        applied: list[Expression] = []
        counts: list[int] = []
        for roles in part:
            first, length = sum(counts), self._length(roles)
            applied.append(self._apply(roles, self._view(family, first, length)))
            counts.append(length)
        return Stack(tuple(applied), family, tuple(counts))

    def _apply(self, roles: Roles, view: _View) -> Expression:
        recipe, method = self.recipe, self.recipe.method
        if not roles.members:
            assert roles.base is not None
            return view(roles.base, roles.base_layers)
        members = tuple(view(member.model, member.layers) for member in roles.members)
        further = (
            (name, tuple(view(member.inputs[name], member.layers) for member in roles.members))
            for name in method.inputs[1:]
        )
        return Apply(
            method,
            ((method.inputs[0], members), *further),
            base=view(roles.base, roles.base_layers) if roles.base else None,
            base_index=roles.base_index,
            parameters=tuple(parameters_of(recipe, roles).items()),
            on_missing=recipe.on_missing,
            passthrough=frozenset(recipe.passthrough),
            base_listed=roles.base_listed,
        )

    def _view(self, family: str, first: int, length: int) -> _View:
        def view(ref: ModelRef, layers: LayerRange | None) -> Expression:
            start = layers[0] if layers else 0
            return Renumber(self.model(ref), Move(family, start, start + length, first))

        return view

    def _is_whole(self, roles: Roles) -> bool:
        """Does a lone section take all layers of all its models, so that nothing moves?"""
        if not roles.section.is_slice:
            return True
        ranges = self._ranges(roles)
        return len({layers for _, layers in ranges}) == 1 and all(
            layers is None or (layers[0] == 0 and layers[1] in self._counts(self.model(ref)))
            for ref, layers in ranges
        )

    def _counts(self, node: Expression) -> set[int]:
        """How many layers a model has, by its names and by its config."""
        if isinstance(node, Stack):
            return {sum(node.counts)}
        if not isinstance(node, Leaf):
            return self._counts(next(children(node)))
        keys = [k for k in node.checkpoint.tensors if k.startswith(self.prefixes)]
        config = node.checkpoint.config if self.prefixes == ("",) else None
        found = main_families(keys, config)
        counted = counted_in(config)
        return ({counted} if counted else set()) | ({found[0][1]} if len(found) == 1 else set())

    def _family(self, roles: Roles) -> str:
        held = self.reference.checkpoint
        keys = [key for key in held.tensors if key.startswith(self.prefixes)]
        found = main_families(keys, held.config if self.prefixes == ("",) else None)
        if len(found) == 1:
            return found[0][0]
        where = self.recipe.document.where(roles.section.path)
        if not found:
            raise RecipeError(
                f"{where}: {self.reference} has no numbered layers to slice.",
                "layers are read off names like prefix.N.",
                fix="models: [...] merges it whole",
            )
        raise RecipeError(
            f"{where}: which layers do slices of {self.reference} mean?",
            f"it has several families: {', '.join(f'{family}.N' for family, _ in found)}",
            fix="modules: {NAME: {slices: [...]}}, with NAME a part of those names, for each",
        )

    def _length(self, roles: Roles) -> int:
        """How many layers a slice gives. Raises RecipeError if its sources disagree."""
        where = self.recipe.document.where(roles.section.path)
        lengths = {}
        for ref, layers in self._ranges(roles):
            if layers is None:
                counts = self._counts(self.model(ref))
                lengths[str(ref)] = min(counts, default=0)
            else:
                lengths[f"{ref} {list(layers)}"] = layers[1] - layers[0]
        if min(lengths.values()) < 1 or any(r and r[0] < 0 for _, r in self._ranges(roles)):
            raise RecipeError(
                f"{where}: a layer_range takes no layers.",
                *lengths,
                fix="layer_range: [FIRST, LAST + 1], counted from 0",
            )
        if len(set(lengths.values())) > 1:
            raise RecipeError(
                f"{where}: the sources of a slice have different numbers of layers.",
                *(f"{count} layers: {name}" for name, count in lengths.items()),
                fix="give them ranges of equal length",
            )
        return lengths.popitem()[1]

    @staticmethod
    def _ranges(roles: Roles) -> list[tuple[ModelRef, LayerRange | None]]:
        ranges = [(member.model, member.layers) for member in roles.members]
        return ranges + ([(roles.base, roles.base_layers)] if roles.base else [])
