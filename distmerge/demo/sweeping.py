"""The boundary between the demo's models and a small sweep that is judged on both domains."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from distmerge.demo.perplexity import PerplexityRow
from distmerge.huggingface.perplexity import log_perplexity
from distmerge.sweeps.results import Result, ranked
from distmerge.sweeps.run import sweep

STRENGTHS = (0.7, 1.0, 1.3)
"""Of the merged task vectors, tried one after the other."""
SCORE = "perplexity"


def sweep_strengths(
    recipe: Path, out: Path, held_out: Mapping[str, Sequence[str]], tokenizer: Any
) -> list[Result]:
    """Try the recipe with each strength, score each candidate on all domains together, write the
    best. The results, the best first."""

    def score(model: torch.nn.Module) -> dict[str, float]:
        nats = [log_perplexity(model, tokenizer, texts) for texts in held_out.values()]
        return {SCORE: math.exp(sum(nats) / len(nats))}

    results = sweep(
        {"recipe": str(recipe), "grid": {"parameters.lambda": list(STRENGTHS)}},
        str(out),
        evaluate={"function": score, "given": "model"},
        keep=f"best 1 by {SCORE}",
        workers=2,
        overwrite=True,  # an earlier demo's
    )
    return ranked(results, SCORE, lowest=True)


def swept_shortfall(
    best: Result, table: Sequence[PerplexityRow], merges: Collection[str]
) -> str | None:
    """Why the sweep did not pay; None if its best reads the domains better than each parent."""
    found = best.scores[SCORE]
    rival = min((row for row in table if row.name not in merges), key=lambda row: row.mean)
    if found < math.exp(rival.mean):
        return None
    return (
        f"No candidate of the sweep reads the two domains better than {rival.name} alone: "
        f"the best has perplexity {found:.2f}, and {rival.name} {math.exp(rival.mean):.2f}."
    )


def show_sweep(swept: Sequence[Result], screen: Console) -> None:
    """What each candidate scored."""
    screen.print("A sweep over the strength of the merge, by both domains together:", style="bold")
    for result in swept:
        kept = "written to sweep" if result.place else "scored, not written"
        screen.print(f"  {result.name:11} {result.scores[SCORE]:6.2f}  {kept}")
    screen.print()
