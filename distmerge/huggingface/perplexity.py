"""The boundary between a causal language model and how well it reads texts: nats per token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from distmerge.errors import ParameterError

_UNSCORED = -100
STEPS = 20
"""Times that a perplexity is told on the way."""
BATCH = 8
"""Windows at a time."""
LONGEST = 1024
"""Tokens of a window, unless a longer one is asked for."""


def text_perplexity(
    pipeline: Any, text: str, *, context: int | None = None, stride: int | None = None
) -> Iterator[dict[str, float]]:
    """The perplexity of a text, read through windows: of its beginning, some `STEPS` times on the
    way, and at last of all of it.

    pipeline: of a causal language model, with its tokenizer.
    context, stride: tokens, see `log_perplexity`; by default what the model takes, at most
        `LONGEST`, and half of it.

    Raises
        ParameterError: no tokenizer, a text of less than two tokens, a window that is longer than
            the model's.
    """
    if getattr(pipeline, "tokenizer", None) is None:
        raise ParameterError("perplexity needs a tokenizer, and the model has none.")
    limit = _limit(pipeline.model)
    if context is not None and limit is not None and context > limit:
        raise ParameterError(f"a context of {context} tokens is longer than the model's {limit}.")
    length = context or min(limit or LONGEST, LONGEST)
    tokens = _quiet(pipeline.tokenizer)(text).input_ids
    windows = list(_windows(tokens, length, _step(length, stride)))
    every = max(1, len(windows) // (BATCH * STEPS))
    for number, nats in enumerate(_means(pipeline.model, iter(windows), BATCH), 1):
        if number % every == 0 or number * BATCH >= len(windows):
            yield {"perplexity": math.exp(nats)}


def _limit(model: Any) -> int | None:
    """Positions that the model knows, if it has so many and no more."""
    config = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else None


def _quiet(tokenizer: Any) -> Any:
    """The tokenizer without its warning that a text is longer than the model's context."""
    return lambda text: tokenizer(text, verbose=False)


def log_perplexity(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    context: int = 128,
    stride: int | None = None,
    batch: int = BATCH,
) -> float:
    """Mean negative log-likelihood per token over all texts, in nats.

    A text of more than `context` tokens is read through windows that start `stride` tokens apart
    (default: half a context). Each token but a text's first is predicted once, from what its
    window holds before it. Texts are taken as they are needed, `batch` windows at a time; the
    model is run as it is, so it should be in eval mode.

    Raises
        ParameterError: a stride outside 1 to `context` - 1, or no text of two tokens.
    """
    step = _step(context, stride)
    windows = (w for text in texts for w in _windows(tokenizer(text).input_ids, context, step))
    *_, nats = _means(model, windows, batch)
    return nats


def _step(context: int, stride: int | None) -> int:
    step = context // 2 if stride is None else stride
    if not 1 <= step < context:
        raise ParameterError(
            f"a stride of {step} tokens leaves tokens without anything before them.",
            f"context: {context} tokens",
            fix=f"stride={context // 2}",
        )
    return step


def _means(
    model: torch.nn.Module, windows: Iterator[tuple[Sequence[int], int]], batch: int
) -> Iterator[float]:
    """Nats per token of the windows so far, after each batch of them."""
    total, scored = 0.0, 0
    while rows := list(islice(windows, batch)):
        nats, tokens = _score(model, rows)
        total += nats
        scored += tokens
        yield total / scored
    if not scored:
        raise ParameterError(
            "there is no token to predict: no text has two.", fix="pass longer texts"
        )


def _windows(
    tokens: Sequence[int], context: int, stride: int
) -> Iterator[tuple[Sequence[int], int]]:
    """(window, how many of its first tokens are not to be scored), covering each token once."""
    done = 1
    for start in range(0, len(tokens), stride):
        stop = min(start + context, len(tokens))
        if stop > done:
            yield tokens[start:stop], done - start
            done = stop


@torch.no_grad()
def _score(model: torch.nn.Module, rows: Sequence[tuple[Sequence[int], int]]) -> tuple[float, int]:
    """Sum of the negative log-likelihoods of the rows' scored tokens, and their number."""
    device = next(model.parameters()).device
    shape = (len(rows), max(len(tokens) for tokens, _ in rows))
    inputs = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, _UNSCORED)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, (tokens, unscored) in enumerate(rows):
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        targets[row, unscored : len(tokens)] = inputs[row, unscored : len(tokens)]
        mask[row, : len(tokens)] = 1
    logits = model(input_ids=inputs.to(device), attention_mask=mask.to(device)).logits
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        targets[:, 1:].flatten().to(device),
        ignore_index=_UNSCORED,
        reduction="sum",
    )
    return nats.item(), int((targets != _UNSCORED).sum())
