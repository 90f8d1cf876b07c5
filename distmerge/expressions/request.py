"""What a recipe, a call and an arithmetic expression all become before planning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distmerge.expressions.nodes import Expression, Leaf, OnShapeMismatch, OnUnequal, leaves
from distmerge.expressions.tokenizer_files import TokenizerFiles


@dataclass(frozen=True)
class MergeRequest:
    """An expression and the settings that its output depends on."""

    root: Expression
    donor: Leaf | None = None
    """Gives config, tokenizer, the spelling of keys, their order and, by default, dtypes: the
    base model, else the first model named. None if every leaf is a state dict in memory."""
    config_from: Leaf | None = None
    """Overrides the donor for config, tokenizer and the other files."""
    out_dtype: str | None = None
    """safetensors' name; None keeps the donor's dtype tensor by tensor."""
    seed: int = 0
    on_unequal: OnUnequal = "error"
    on_shape_mismatch: OnShapeMismatch = "error"
    tokenizer: TokenizerFiles | None = None
    """Instead of the donor's; None where the donor's is the output's."""
    recipe_text: str | None = None
    """The recipe as it was written, when the request came from one."""
    intermediates: tuple[tuple[str, MergeRequest], ...] = field(default=(), compare=False)
    """Merges nested in this one that have names, so that they could be written apart."""
    warnings: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()
    """Those of the warnings that tell of something in the recipe that fits nothing in the files."""
    strict: bool = field(default=False, compare=False)
    """Is that an error?"""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def files_from(self) -> Leaf | None:
        """Who gives config, tokenizer and the other files."""
        return self.config_from or self.donor


def request_for(root: Expression, **settings: Any) -> MergeRequest:
    """A request whose donor is the first checkpoint in the expression, the base where there is
    one."""
    donor = next((leaf for leaf in leaves(root) if isinstance(leaf, Leaf)), None)
    return MergeRequest(root, donor, warnings=warnings_of(root), **settings)


def warnings_of(root: Expression) -> tuple[str, ...]:
    """What its checkpoints warn of, each sentence once."""
    found = (leaf.checkpoint.warnings for leaf in leaves(root) if isinstance(leaf, Leaf))
    return tuple(dict.fromkeys(text for warnings in found for text in warnings))
