"""Models with the embeddings of another vocabulary than their files': views, from headers alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from distmerge.checkpoints.row_map import Matrix, Pairs, row_map
from distmerge.checkpoints.spellings import EMBEDDING, OUTPUT, ties, vocabulary
from distmerge.checkpoints.tensors import Checkpoint, TensorInfo
from distmerge.checkpoints.views import View
from distmerge.errors import CheckpointError, ShapeMismatch

Held = TensorInfo | View


def embeddings_of(checkpoint: Checkpoint) -> dict[str, Held]:
    """The tensors with a row for each token: input embeddings first, then output layers and their
    biases.

    Raises
        CheckpointError: there is none.
    """
    held = checkpoint.presented
    sizes = vocabulary(checkpoint.config)
    inputs = {k: t for k, t in held.items() if EMBEDDING.search(k) and len(t.shape) == 2}
    outputs = {k: t for k, t in held.items() if OUTPUT.search(k) and len(t.shape) == 2}
    of_inputs = frozenset(t.shape[0] for t in inputs.values())
    counts = of_inputs & sizes or of_inputs or sizes
    found = {k: t for k, t in {**inputs, **outputs}.items() if t.shape[0] in counts}
    for key in list(found):
        bias = key.removesuffix("weight") + "bias"
        if bias in held and held[bias].shape == found[key].shape[:1]:
            found[bias] = held[bias]
    if not found:
        raise CheckpointError(
            f"{checkpoint.url} has no embeddings that could be brought to another vocabulary.",
            fix="leave 'tokenizer:' out",
        )
    return found


def rows_of(checkpoint: Checkpoint) -> int:
    """How many rows its embeddings have. Raises CheckpointError."""
    return min(tensor.shape[0] for tensor in embeddings_of(checkpoint).values())


def with_rows(
    checkpoints: Sequence[Checkpoint], rows: Sequence[Sequence[Pairs]], count: int
) -> list[Checkpoint]:
    """The models, their embeddings made of rows of all of them.

    Args
        rows: for each model, what each row is made of; models by their number.
        count: rows in the end; those that nothing is said of are the mean of the others.

    Raises
        CheckpointError: a model without embeddings, or without those that another takes rows of.
        ShapeMismatch: embeddings of different widths.
    """
    held = [embeddings_of(checkpoint) for checkpoint in checkpoints]
    _add_tied_heads(checkpoints, held)
    return [
        _with_rows(i, checkpoints, held, rows[i], count - len(rows[i]))
        for i in range(len(checkpoints))
    ]


def _add_tied_heads(checkpoints: Sequence[Checkpoint], held: Sequence[dict[str, Held]]) -> None:
    """Where some models have a head of their own, give it to those that tie theirs: of tokens that
    they lack they take rows of heads, not of embeddings."""
    heads = [
        key for own in held for key, one in own.items() if _output(key) and len(one.shape) == 2
    ]
    for checkpoint, own in zip(checkpoints, held, strict=True):
        if heads and ties(checkpoint.config) and not any(map(_output, own)):
            embedding = next((one for key, one in own.items() if EMBEDDING.search(key)), None)
            if embedding is not None:
                own[heads[0]] = embedding


def _with_rows(
    at: int,
    checkpoints: Sequence[Checkpoint],
    held: Sequence[dict[str, Held]],
    rows: Sequence[Pairs],
    padding: int,
) -> Checkpoint:
    own = checkpoints[at]
    lent = sorted({model for pairs in rows for model, _ in pairs} - {at})
    sources, borrowed = _borrow(own, lent, checkpoints)
    sources[at] = tuple(range(1 + len(own.others) + len(own.borrowed)))
    views: dict[str, View] = {}
    for key, tensor in held[at].items():
        matrices = []
        for model, theirs in enumerate(held):
            matrix = tensor if model == at or model not in lent else _counterpart(key, theirs)
            if matrix is None or matrix.shape[1:] != tensor.shape[1:]:
                raise _unlike(key, own, checkpoints[model], matrix)
            matrices.append(Matrix(matrix, sources.get(model, (0,))))
        views[key] = row_map(matrices, at, rows, padding)
    text = f"{[checkpoints[model].fingerprint for model in lent]} {at} {padding} {list(rows)}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return replace(
        own,
        views={**own.views, **views},
        borrowed=(*own.borrowed, *borrowed),
        settings=f"{own.settings}\nrows {digest}".strip(),
    )


def _borrow(
    own: Checkpoint, lent: Sequence[int], checkpoints: Sequence[Checkpoint]
) -> tuple[dict[int, tuple[int, ...]], list[Checkpoint]]:
    """The checkpoints that rows are taken from, and where their sources are found."""
    sources: dict[int, tuple[int, ...]] = {}
    borrowed: list[Checkpoint] = []
    for model in lent:
        first = 1 + len(own.others) + len(own.borrowed) + len(borrowed)
        parts = (checkpoints[model], *checkpoints[model].others, *checkpoints[model].borrowed)
        sources[model] = tuple(range(first, first + len(parts)))
        borrowed += parts
    return sources, borrowed


def _counterpart(key: str, among: dict[str, Held]) -> Held | None:
    """Another model's tensor for this key: of its name, of its last names, or of its kind. Tied
    heads are the embeddings."""
    if key in among:
        return among[key]
    last = ".".join(key.split(".")[-2:])
    bias = key.endswith("bias")
    ranked = [
        [k for k in among if k.endswith(last)],
        [k for k in among if k.endswith("bias") == bias and bool(OUTPUT.search(k)) == _output(key)],
        [] if bias else [k for k in among if EMBEDDING.search(k)],
    ]
    return next((among[keys[0]] for keys in ranked if keys), None)


def _output(key: str) -> bool:
    return OUTPUT.search(key) is not None


def _unlike(key: str, own: Checkpoint, other: Checkpoint, found: Held | None) -> Exception:
    if found is None:
        return CheckpointError(
            f"{other.url} has no counterpart of {key}, of which {own.url} is to take rows.",
            fix="tokenizer: {source: base}, or models of one architecture",
        )
    return ShapeMismatch(
        f"The embeddings of {own.url} and {other.url} have different widths.",
        f"{key}: rows of {' x '.join(map(str, found.shape[1:]))} in the second",
        fix="merge models of one width",
    )
