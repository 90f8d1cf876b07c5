"""What is wrong between the models: gathered over all keys, so that one run tells it all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from distmerge.checkpoints.spellings import EMBEDDING, OUTPUT
from distmerge.errors import DtypeMismatch, KeyMismatch, ShapeMismatch

SHOWN = 8
"""Keys that an error lists before it says how many more there are."""


@dataclass
class Problems:
    """What is wrong between the models, gathered over all keys and reported together."""

    missing: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, list[str]] = field(default_factory=dict)
    dtypes: dict[str, list[str]] = field(default_factory=dict)

    def raise_any(self) -> None:
        """Raises KeyMismatch, ShapeMismatch or DtypeMismatch, naming keys, models and sizes."""
        if self.missing:
            raise KeyMismatch(
                f"Models disagree on {_count(len(self.missing), 'key')}.",
                *_shown([f"{key}: {lacks}" for key, lacks in self.missing.items()]),
                fix="on_missing: average (of those that have it), base or common; "
                "or passthrough=[...] for heads",
            )
        if self.shapes:
            first = next(iter(self.shapes))
            facts = [f"{key}: " + ", ".join(where) for key, where in self.shapes.items()]
            fix = f"on_shape_mismatch: base (or skip), or give tensors of one shape for {first}"
            if all(EMBEDDING.search(key) or OUTPUT.search(key) for key in self.shapes):
                fix = "tokenizer: {source: union} (or base), where their vocabularies differ; or "
                fix += "on_shape_mismatch: base (or skip)"
            raise ShapeMismatch(
                f"Models disagree on the shape of {_count(len(self.shapes), 'tensor')}.",
                *_shown(facts),
                fix=fix,
            )
        if self.dtypes:
            facts = [f"{key}: " + ", ".join(where) for key, where in self.dtypes.items()]
            raise DtypeMismatch(
                f"Models disagree on the kind of {_count(len(self.dtypes), 'tensor')}.",
                *_shown(facts),
                fix="floats merge with floats; integers are copied, from models that have them in "
                "one dtype",
            )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _shown(facts: Sequence[str]) -> list[str]:
    more = [f"... and {len(facts) - SHOWN} more"] if len(facts) > SHOWN else []
    return [*facts[:SHOWN], *more]
