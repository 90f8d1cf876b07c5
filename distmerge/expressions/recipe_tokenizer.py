"""What a recipe says of the output's vocabulary: `tokenizer:` and `tokenizer_source:`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from distmerge.checkpoints.location import HUB_SCHEME, Location
from distmerge.errors import CheckpointNotFound, DistmergeError, RecipeError
from distmerge.expressions.model_ref import ModelRef
from distmerge.expressions.recipe_text import Document
from distmerge.expressions.recipe_words import REFERENCE_KEYS, TOP_KEYS
from distmerge.expressions.yaml_lines import KeyPath

TOKENIZER_KEYS = frozenset({"source", "tokens", "pad_to_multiple_of"})
TOKEN_KEYS = frozenset({"source", "force"})
SOURCE_KEYS = frozenset({"kind", "model", "token", "token_id"})


class Zero(BaseModel):
    """An embedding of zeros."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["zero"]


class ModelToken(BaseModel):
    """The embedding of another token of some model."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["model_token"]
    model: ModelRef
    token: str | None = None
    token_id: Annotated[int | None, Field(ge=0)] = None

    @model_validator(mode="after")
    def _one(self) -> ModelToken:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("give one of token and token_id")
        return self


FORMS = ("(zero)", "(model_token)", "(model)")
"""What pydantic calls the forms of a source."""
_KINDS = "its kind is zero or model_token; a model is named without"


def _form_of(given: Any) -> str | None:
    """A mapping without a kind is a model, as a word is."""
    kind = given.get("kind", "model") if isinstance(given, Mapping) else "model"
    return f"({kind})" if kind in ("zero", "model_token", "model") else None


class TokenRule(BaseModel):
    """Where the embedding of one token comes from."""

    model_config = ConfigDict(frozen=True)

    source: Annotated[
        Annotated[Zero, Tag(FORMS[0])]
        | Annotated[ModelToken, Tag(FORMS[1])]
        | Annotated[ModelRef, Tag(FORMS[2])],
        Discriminator(_form_of, custom_error_type="kind", custom_error_message=_KINDS),
    ]
    """A model stands for its own embedding of the token."""
    force: bool = False
    """Do models that have the token take it too?"""


class TokenizerSection(BaseModel):
    """Which vocabulary the output has."""

    model_config = ConfigDict(frozen=True)

    source: ModelRef = ModelRef(path="union")
    """`union`, `base`, or a model whose tokenizer it is."""
    tokens: dict[str, TokenRule] = {}
    pad_to_multiple_of: Annotated[int | None, Field(ge=1)] = None

    @property
    def model(self) -> ModelRef | None:
        """The model whose tokenizer it is, if one is named."""
        return None if self.source.path in ("union", "base") else self.source

    def models(self) -> Iterator[ModelRef]:
        """Every model that is named."""
        if self.model is not None:
            yield self.model
        for rule in self.tokens.values():
            if isinstance(rule.source, ModelRef):
                yield rule.source
            elif isinstance(rule.source, ModelToken):
                yield rule.source.model


@dataclass(frozen=True)
class Misspelt:
    """A name that may stand for another one."""

    where: str
    meant: str

    def told(self, error: DistmergeError) -> DistmergeError:
        """What went wrong with the name, and what may have been meant."""
        fix = f"did you mean {self.meant!r}?" + (f" Else: {error.fix}" if error.fix else "")
        return type(error)(error.headline, *error.facts, self.where, fix=fix)


def check_names(section: TokenizerSection, document: Document, models: Mapping[str, bool]) -> None:
    """Refuse a name that is nearly a model's: as a name on the Hub it would be looked for there.

    models: what the recipe calls its models, and whether each is on the Hub.

    Raises
        RecipeError: nothing on this machine has that name, and one of the models nearly has.
    """
    here = [name for name, remote in models.items() if not remote]
    for at, ref in _named(section, document):
        if ref.path in models or not _may_be_misspelt(ref):
            continue
        near = difflib.get_close_matches(ref.path, ["union", "base", *here], 1)
        if near:
            raise RecipeError(
                f"{document.where(at)}: there is no {str(ref)!r}, here or among the models.",
                f"the recipe's models: {', '.join(models)}",
                fix=f"did you mean {near[0]!r}? A model on the Hub is spelt hf://ORG/NAME",
            )


def near_names(
    section: TokenizerSection, document: Document, models: Collection[str]
) -> dict[Location, Misspelt]:
    """Models of the Hub with a name that is nearly that of one of the recipe's: should they not be
    there, what may have been meant."""
    return {
        ref.location: Misspelt(document.where(at), near[0])
        for at, ref in _named(section, document)
        if ref.path not in models
        and ref.location.root.startswith(HUB_SCHEME)
        and (near := difflib.get_close_matches(ref.path, models, 1))
    }


def _named(section: TokenizerSection, document: Document) -> Iterator[tuple[KeyPath, ModelRef]]:
    """Where which models are named."""
    if section.model is not None:
        own = "tokenizer" in document.data
        yield ("tokenizer", "source") if own else ("tokenizer_source",), section.model
    for token, rule in section.tokens.items():
        given = rule.source.model if isinstance(rule.source, ModelToken) else rule.source
        if isinstance(given, ModelRef):
            yield ("tokenizer", "tokens", token, "source"), given


def _may_be_misspelt(ref: ModelRef) -> bool:
    try:
        location = ref.location
    except CheckpointNotFound:
        return True
    parent = os.path.dirname(ref.path)
    return location.bare and (not parent or os.path.isdir(parent))


def one_section(
    section: TokenizerSection | None, source: ModelRef | None, document: Document
) -> TokenizerSection | None:
    """What `tokenizer:` and `tokenizer_source:` say together. Raises RecipeError if both speak."""
    if section is not None and source is not None:
        raise RecipeError(
            f"{document.where(('tokenizer_source',))}: there is a 'tokenizer:' too.",
            fix="keep one: tokenizer: {source: ...}",
        )
    return section if source is None else TokenizerSection(source=source)


def unknown_keys(document: Document) -> Iterator[tuple[KeyPath, str]]:
    """Keys under `tokenizer:` that mean nothing, each with what to do about it."""
    section = document.data.get("tokenizer")
    yield from _unknown(section, ("tokenizer",), TOKENIZER_KEYS)
    if isinstance(section, dict):
        yield from _unknown(section.get("source"), ("tokenizer", "source"), REFERENCE_KEYS)
    tokens = section.get("tokens") if isinstance(section, dict) else None
    for token, rule in tokens.items() if isinstance(tokens, dict) else ():
        place = ("tokenizer", "tokens", token)
        yield from _unknown(rule, place, TOKEN_KEYS)
        source = rule.get("source") if isinstance(rule, dict) else None
        known = SOURCE_KEYS if isinstance(source, dict) and "kind" in source else REFERENCE_KEYS
        yield from _unknown(source, (*place, "source"), known)


def _unknown(data: Any, path: KeyPath, known: frozenset[str]) -> Iterator[tuple[KeyPath, str]]:
    for key in data if isinstance(data, dict) else ():
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), 1)
            fix = f"write {near[0]!r}" if near else "leave it out"
            yield (*path, key), "move it to the top level" if key in TOP_KEYS else fix
