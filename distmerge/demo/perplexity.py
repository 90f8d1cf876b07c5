"""The boundary between a language model and what is said of it: nats per held-out token."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distmerge.huggingface.perplexity import log_perplexity


@dataclass(frozen=True)
class PerplexityRow:
    """One model's mean negative log-likelihood per token, in nats."""

    name: str
    nats: dict[str, float]
    """By domain."""

    @property
    def mean(self) -> float:
        """Over the domains, each counted once."""
        return sum(self.nats.values()) / len(self.nats)


def perplexity_table(
    rows: Mapping[str, torch.nn.Module | str | Path],
    domains: Mapping[str, Sequence[str]],
    *,
    tokenizer: Any,
    context: int = 128,
) -> list[PerplexityRow]:
    """Measure each model on each domain's texts.

    A model is a causal language model or the directory of one, which is loaded for as long as
    its row takes.
    """
    table = []
    for name, source in rows.items():
        model = source if isinstance(source, torch.nn.Module) else _load(source)
        nats = {
            domain: log_perplexity(model, tokenizer, texts, context=context)
            for domain, texts in domains.items()
        }
        table.append(PerplexityRow(name, nats))
    return table


def merge_margin(table: Sequence[PerplexityRow], merges: Collection[str]) -> float:
    """By how many nats, on the mean of the domains, the best of `merges` beats all other rows.

    Positive only where it is better than each of them.
    """
    best = min(row.mean for row in table if row.name in merges)
    return min(row.mean for row in table if row.name not in merges) - best


def _load(folder: str | Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()
