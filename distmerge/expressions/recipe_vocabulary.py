"""The boundary between what a recipe says of the vocabulary and the models that it opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from distmerge.checkpoints.location import Location
from distmerge.checkpoints.store import StorageOptions
from distmerge.expressions.model_ref import ModelRef
from distmerge.expressions.nodes import Leaf
from distmerge.expressions.recipe_tokenizer import ModelToken, TokenizerSection, TokenRule
from distmerge.expressions.tokenizer_files import TokenizerFiles
from distmerge.expressions.vocabularies import Asked, Wanted, one_vocabulary

ModelOf = Callable[[ModelRef], Leaf]


@dataclass(frozen=True)
class InOneVocabulary:
    """A recipe's models in the output's vocabulary."""

    opened: Mapping[Location, Leaf]
    tokenizer: TokenizerFiles
    warnings: tuple[str, ...]


def in_one_vocabulary(
    section: TokenizerSection,
    model_of: ModelOf,
    opened: Mapping[Location, Leaf],
    *,
    merged: Sequence[Location],
    config_from: Location | None,
    options: StorageOptions,
) -> InOneVocabulary:
    """The models that were opened, those that are merged in the vocabulary that is asked for.

    merged: where they are, the base first.

    Raises
        what `one_vocabulary` does
    """
    source = section.source.path if section.model is None else model_of(section.source)
    tokens = {token: _wanted(token, rule, model_of) for token, rule in section.tokens.items()}
    asked = Asked(source, tokens, section.pad_to_multiple_of or 1)
    donor = config_from or merged[0]
    found = one_vocabulary([opened[at] for at in merged], opened[donor], asked, options)
    now = {donor: found.config_from, **dict(zip(merged, found.leaves, strict=True))}
    return InOneVocabulary({**opened, **now}, found.tokenizer, found.warnings)


def _wanted(token: str, rule: TokenRule, model_of: ModelOf) -> Wanted:
    source = rule.source
    if isinstance(source, ModelRef):
        return Wanted(model_of(source), token, rule.force)
    if isinstance(source, ModelToken):
        at = source.token_id if source.token is None else source.token
        assert at is not None
        return Wanted(model_of(source.model), at, rule.force)
    return Wanted(None, force=rule.force)
