"""The boundary between models of different vocabularies and a merge in which all have one.

The tokenizers are read; then every model is presented with embeddings, and a config, of the
output's vocabulary. Weights are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from distmerge.checkpoints.embeddings import rows_of, with_rows
from distmerge.checkpoints.heads import parse_json, read_bytes
from distmerge.checkpoints.malformed import quoted
from distmerge.checkpoints.opening import open_store
from distmerge.checkpoints.store import StorageOptions
from distmerge.checkpoints.tensors import Checkpoint
from distmerge.checkpoints.vocabulary import Chosen, row_sources
from distmerge.errors import RecipeError
from distmerge.expressions.nodes import Leaf
from distmerge.expressions.token_ids import with_token_ids, with_vocab_size
from distmerge.expressions.tokenizer_files import NAMES, TokenizerFiles

if TYPE_CHECKING:
    from distmerge.huggingface.tokenizers import Tokens

LARGEST = 256 << 20
"""Bytes of a file that can be a tokenizer's."""
FARTHEST, GAP = 2, 10_000
"""How far ids may go beyond rows or tokens: so many times as many, and so many more."""
GENERATION = "generation_config.json"
SHOWN = 5


@dataclass(frozen=True)
class Wanted:
    """The embedding that a recipe asks for, for one token."""

    model: Leaf | None
    """None for zeros."""
    token: str | int = ""
    """Of the model, by its text or its id."""
    force: bool = False


@dataclass(frozen=True)
class Asked:
    """What a recipe asks of the vocabulary."""

    source: str | Leaf = "union"
    """`union`, `base`, or the model whose tokenizer it is."""
    tokens: Mapping[str, Wanted] = field(default_factory=dict)
    multiple: int = 1
    """The number of rows is a multiple of it."""


@dataclass(frozen=True)
class OneVocabulary:
    """Models of one vocabulary."""

    leaves: tuple[Leaf, ...]
    config_from: Leaf
    tokenizer: TokenizerFiles
    warnings: tuple[str, ...] = ()


def one_vocabulary(
    models: Sequence[Leaf], config_from: Leaf, asked: Asked, options: StorageOptions
) -> OneVocabulary:
    """Present the models in the vocabulary that is asked for.

    models: the base first. config_from: whose config the output has.

    Raises
        RecipeError: a tokenizer that is missing or can't be loaded; a token that its source lacks;
            a model without embeddings.
    """
    held = {leaf: tokenizer_of(leaf, options) for leaf in models}
    source = asked.source if isinstance(asked.source, Leaf) else models[0]
    if source not in held:
        held[source] = tokenizer_of(source, options)
    rows = [rows_of(leaf.checkpoint) for leaf in models]
    _check_ids(held[source].ids, max(rows), source)
    own = [
        {token: i for token, i in held[leaf].ids.items() if i < count}
        for leaf, count in zip(models, rows, strict=True)
    ]
    out = _output(held[source], [held[leaf] for leaf in models], own, asked)
    chosen = {t: _chosen(t, w, models, own, rows) for t, w in asked.tokens.items()}
    found = row_sources(out.ids, own, 0, chosen)
    count = len(found.rows[0])
    count += -count % asked.multiple
    checkpoints = with_rows([leaf.checkpoint for leaf in models], found.rows, count)
    leaves = {
        leaf: replace(leaf, checkpoint=_told(checkpoint, held[leaf].ids, source, out, count))
        for leaf, checkpoint in zip(models, checkpoints, strict=True)
    }
    files = {name: content for name, content in out.files.items() if name in NAMES}
    whose = held.get(config_from, held[models[0]])
    files |= _generation(config_from, whose, source, out, options)
    if config_from not in leaves:
        told = _told(config_from.checkpoint, whose.ids, source, out, count)
        config_from = replace(config_from, checkpoint=told)
    return OneVocabulary(
        tuple(leaves.values()),
        leaves.get(config_from, config_from),
        TokenizerFiles(files),
        _warnings(found.unknown),
    )


def _check_ids(ids: Mapping[str, int], rows: int, source: Leaf) -> None:
    """Refuse ids that would make embeddings of mostly nothing: each number up to the largest gets
    a row. Raises RecipeError."""
    last = max(ids, key=ids.__getitem__, default=None)
    if last is not None and ids[last] >= FARTHEST * max(rows, len(ids)) + GAP:
        raise RecipeError(
            f"The tokenizer of {source} gives {quoted(last)} the id {ids[last]:,}.",
            f"it has {len(ids):,} tokens, and embeddings have {rows:,} rows",
            fix="correct its tokenizer.json, or name another model: tokenizer: {source: ...}",
        )


def _told(
    checkpoint: Checkpoint, own: Mapping[str, int], source: Leaf, out: Tokens, count: int
) -> Checkpoint:
    """The model with a config that tells of the output's vocabulary."""
    if checkpoint.config is None:
        return checkpoint
    config = with_token_ids(checkpoint.config, own, source.checkpoint.config or {}, out.ids)
    return replace(checkpoint, config=with_vocab_size(config, count))


def tokenizer_of(leaf: Leaf, options: StorageOptions) -> Tokens:
    """A model's tokenizer.

    Raises
        RecipeError: it has none, or transformers can't load it.
        MalformedCheckpoint: a file that should be a JSON object isn't.
    """
    from distmerge.huggingface.tokenizers import read_tokenizer  # a door upward

    files = read_files(leaf, [*NAMES, "config.json"], options)
    if not files.keys() - {"config.json"}:
        raise RecipeError(
            f"{leaf} has no tokenizer.", fix="leave 'tokenizer:' out, or copy one to the model"
        )
    for name, content in files.items():
        if name.endswith(".json"):
            parse_json(content, f"{name} of {leaf}")
    return read_tokenizer(str(leaf), files)


def read_files(leaf: Leaf, names: Sequence[str], options: StorageOptions) -> dict[str, bytes]:
    """Those of the files that the model has, by name."""
    checkpoint = leaf.checkpoint
    found = [checkpoint.files[name] for name in names if name in checkpoint.files]
    with closing(open_store(checkpoint.root, options, revision=checkpoint.revision)) as store:
        return {
            file.path: read_bytes(store, file, 0, file.size)
            for file in found
            if file.size <= LARGEST
        }


def _output(
    source: Tokens, held: Sequence[Tokens], own: Sequence[Mapping[str, int]], asked: Asked
) -> Tokens:
    """The output's tokenizer."""
    from distmerge.huggingface.tokenizers import with_tokens  # a door upward

    wanted = [token for ids in own for token in ids] if asked.source == "union" else []
    return with_tokens(source, held, list(dict.fromkeys([*wanted, *asked.tokens])))


def _chosen(
    token: str,
    wanted: Wanted,
    models: Sequence[Leaf],
    own: Sequence[Mapping[str, int]],
    rows: Sequence[int],
) -> Chosen:
    if wanted.model is None:
        return Chosen((), wanted.force)
    if wanted.model not in models:
        raise RecipeError(
            f"The embedding of {token!r} comes from {wanted.model}, which isn't merged.",
            fix=f"tokens: {{{token}: {{source: ...}}}}, one of {', '.join(map(str, models))}",
        )
    model = models.index(wanted.model)
    row = wanted.token if isinstance(wanted.token, int) else own[model].get(wanted.token, -1)
    if not 0 <= row < rows[model]:
        raise RecipeError(
            f"{wanted.model} has no embedding of {wanted.token!r}, which {token!r} is to have.",
            f"it has {len(own[model])} tokens and {rows[model]} rows",
            fix="name a token that this model has, or source: {kind: zero}",
        )
    return Chosen(((model, row),), wanted.force)


def _generation(
    donor: Leaf, own: Tokens, source: Leaf, out: Tokens, options: StorageOptions
) -> dict[str, bytes]:
    """The donor's generation_config.json, with the output's token ids."""
    mine = read_files(donor, [GENERATION], options)
    if not mine or source == donor:
        return {}
    theirs = read_files(source, [GENERATION], options)
    origin = source.checkpoint.config
    if theirs:
        origin = parse_json(theirs[GENERATION], f"{GENERATION} of {source}")
    given = parse_json(mine[GENERATION], f"{GENERATION} of {donor}")
    edited = with_token_ids(given, own.ids, origin or {}, out.ids)
    return {GENERATION: (json.dumps(edited, indent=2) + "\n").encode()}


def _warnings(unknown: Sequence[str]) -> tuple[str, ...]:
    if not unknown:
        return ()
    shown = ", ".join(map(repr, unknown[:SHOWN]))
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    return (f"No model has an embedding of {shown}{more}: zeros are taken.",)
