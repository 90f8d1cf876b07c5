"""The boundary between an adapter's adapter_config.json and what its weights mean.

peft merges what it knows; an adapter that asks for something else is refused by the name of what
it asks for, since leaving that out would give another model without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distmerge.checkpoints.adapter_patterns import Patterns, check_matches, read_patterns
from distmerge.checkpoints.layout import listed
from distmerge.checkpoints.malformed import LARGEST, quoted
from distmerge.errors import CheckpointError, MalformedCheckpoint

_READ = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type"})
_SEEN_IN_WEIGHTS = frozenset(
    {"fan_in_fan_out", "use_dora", "lora_bias", "bias", "modules_to_save", "target_modules"}
)
"""What the adapter's tensors show by themselves."""
_OF_TRAINING = frozenset(
    re.findall(
        r"\w+",
        """
        auto_mapping base_model_name_or_path revision task_type inference_mode lora_dropout
        exclude_modules layers_to_transform layers_pattern peft_version ensure_weight_tying
        loftq_config eva_config corda_config lora_ga_config qalora_group_size megatron_core
        runtime_config velora_config monteclora_config init_lora_weights
        """,
    )
)
_SHOWN = 3
"""Mistakes that an error tells."""
_FLOAT32 = np.finfo(np.float32)
_Scale = Annotated[float, Field(ge=float(_FLOAT32.min), le=float(_FLOAT32.max))]
"""What a product is scaled by, in float32."""
_REWRITE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that change the base's weights, which the adapter alone doesn't hold."""


class _Given(BaseModel):
    """What is read of an adapter_config.json; of other types than peft writes, nothing is taken."""

    model_config = ConfigDict(strict=True, frozen=True)

    peft_type: str | None = None
    init_lora_weights: bool | str | None = None
    r: Annotated[int, Field(ge=1, le=LARGEST)]
    lora_alpha: _Scale
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=LARGEST)]] | None = None
    alpha_pattern: dict[str, _Scale] | None = None


@dataclass(frozen=True)
class AdapterConfig:
    """What scales an adapter's products."""

    rank: int
    alpha: float
    root_rank: bool
    """rsLoRA: divided by the root of the rank."""
    ranks: Patterns[int] = field(default_factory=Patterns)
    alphas: Patterns[float] = field(default_factory=Patterns)
    fan_in_fan_out: bool = False

    def check_modules(self, count: int, place: str) -> None:
        """Refuse more modules than the patterns can be held against. Raises
        MalformedCheckpoint."""
        check_matches((self.ranks, self.alphas), count, place)

    def rank_of(self, module: str) -> int:
        return self.ranks.value_of(module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by for a module."""
        rank = self.rank_of(module)
        alpha = self.alphas.value_of(module, self.alpha)
        return alpha / (math.sqrt(rank) if self.root_rank else rank)


def read_adapter_config(found: Mapping[str, Any], place: str) -> AdapterConfig:
    """What an adapter_config.json says.

    Raises
        CheckpointError: it isn't LoRA, or asks for something that isn't known here.
        MalformedCheckpoint: values of other kinds than peft writes.
    """
    kind = str(found.get("peft_type", "")).upper()[:80]
    if kind != "LORA":
        raise _refused(f"{place} is an adapter of type {kind or 'unknown'}, not LoRA.")
    begun = str(found.get("init_lora_weights") or "").lower()[:80]
    if begun.startswith(_REWRITE_THE_BASE):
        raise _refused(
            f"{place} was begun with init_lora_weights: {begun}, which changes the base's weights.",
            "the adapter alone doesn't hold that change",
        )
    known = _READ | _SEEN_IN_WEIGHTS | _OF_TRAINING
    asked = sorted(name for name, value in found.items() if name not in known and value)
    if asked:
        raise _refused(f"{place} asks for {listed(asked)}, which isn't supported.")
    try:
        given = _Given.model_validate(found)
    except ValidationError as error:
        raise MalformedCheckpoint(
            f"{place} has an adapter_config.json without usable values.",
            *_mistakes(error),
            fix="write what peft's save_pretrained() writes: r a whole number, lora_alpha a number",
        ) from None
    return AdapterConfig(
        rank=given.r,
        alpha=given.lora_alpha,
        root_rank=bool(given.use_rslora),
        ranks=read_patterns(given.rank_pattern or {}, f"rank_pattern of {place}"),
        alphas=read_patterns(given.alpha_pattern or {}, f"alpha_pattern of {place}"),
        fan_in_fan_out=bool(given.fan_in_fan_out),
    )


def _mistakes(error: ValidationError) -> list[str]:
    """The first few, a fact each."""
    found = error.errors(include_url=False)
    facts = []
    for one in found[:_SHOWN]:
        name = ".".join(str(part)[:80] for part in one["loc"])
        given = "" if one["type"] == "missing" else f", not {quoted(one['input'])}"
        facts.append(f"{name}: {one['msg']}{given}")
    return facts + ([f"and {len(found) - _SHOWN:,} more"] if len(found) > _SHOWN else [])


def _refused(headline: str, *facts: str) -> CheckpointError:
    return CheckpointError(
        headline,
        *facts,
        fix="merge it into its base with peft: merge_and_unload(), save_pretrained(); "
        "then name the result",
    )
