"""Which row of which model's embeddings stands for each token of the output's vocabulary.

A model that has a token keeps its own row. One that hasn't takes what the recipe says, else the
base's row, else the only one there is, else the mean of those that there are; a token that no model
has begins at zero. So mergekit fills vocabularies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distmerge.checkpoints.row_map import Pairs


@dataclass(frozen=True)
class Chosen:
    """What a recipe says of one token."""

    pairs: Pairs
    """The row to take, of which model; none for zeros."""
    force: bool = False
    """Do models that have the token take it too?"""


@dataclass(frozen=True)
class RowSources:
    """For each model, what each row of its embeddings is made of."""

    rows: Sequence[Sequence[Pairs]]
    unknown: tuple[str, ...]
    """Tokens that no model has and of which the recipe says nothing."""


def row_sources(
    tokens: Mapping[str, int],
    vocabularies: Sequence[Mapping[str, int]],
    base: int,
    chosen: Mapping[str, Chosen],
) -> RowSources:
    """Decide for every model and token.

    Args
        tokens: the output's, each with its row.
        vocabularies: the models', as far as their embeddings have rows.
        base: which of the models is the base.
        chosen: what the recipe says.
    """
    count = 1 + max(tokens.values(), default=-1)
    found: list[list[Pairs]] = [[()] * count for _ in vocabularies]
    unknown = []
    for token, row in tokens.items():
        own: list[tuple[int, int] | None] = [
            (model, held[token]) if token in held else None
            for model, held in enumerate(vocabularies)
        ]
        rule = chosen.get(token) or _usual(own, base)
        if token not in chosen and not rule.pairs:
            unknown.append(token)
        for model, mine in enumerate(own):
            found[model][row] = rule.pairs if mine is None or rule.force else (mine,)
    return RowSources(found, tuple(unknown))


def _usual(own: Sequence[tuple[int, int] | None], base: int) -> Chosen:
    """What a model without the token takes if the recipe says nothing."""
    based = own[base]
    have = tuple(pair for pair in own if pair is not None)
    return Chosen((based,) if based is not None else have)
