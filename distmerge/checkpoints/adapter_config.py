"""The boundary between an adapter's adapter_config.json and what its weights mean.

peft merges what it knows; an adapter that asks for something else is refused by the name of what
it asks for, since leaving that out would give another model without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distmerge.errors import CheckpointError

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
_REWRITE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that change the base's weights, which the adapter alone doesn't hold."""


@dataclass(frozen=True)
class AdapterConfig:
    """What scales an adapter's products."""

    rank: int
    alpha: float
    root_rank: bool
    """rsLoRA: divided by the root of the rank."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    def rank_of(self, module: str) -> int:
        return int(_for_module(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by for a module."""
        rank = self.rank_of(module)
        alpha = float(_for_module(self.alphas, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.root_rank else rank)


def read_adapter_config(found: Mapping[str, Any], place: str) -> AdapterConfig:
    """What an adapter_config.json says.

    Raises
        CheckpointError: it isn't LoRA, or asks for something that isn't known here.
    """
    kind = str(found.get("peft_type", "")).upper()
    if kind != "LORA":
        raise _refused(f"{place} is an adapter of type {kind or 'unknown'}, not LoRA.")
    begun = str(found.get("init_lora_weights") or "").lower()
    if begun.startswith(_REWRITE_THE_BASE):
        raise _refused(
            f"{place} was begun with init_lora_weights: {begun}, which changes the base's weights.",
            "the adapter alone doesn't hold that change",
        )
    known = _READ | _SEEN_IN_WEIGHTS | _OF_TRAINING
    asked = sorted(name for name, value in found.items() if name not in known and value)
    if asked:
        raise _refused(f"{place} asks for {', '.join(asked)}, which isn't supported.")
    try:
        return AdapterConfig(
            rank=_rank(found["r"]),
            alpha=_finite(found["lora_alpha"]),
            root_rank=bool(found.get("use_rslora")),
            ranks={k: _rank(v) for k, v in dict(found.get("rank_pattern") or {}).items()},
            alphas={k: _finite(v) for k, v in dict(found.get("alpha_pattern") or {}).items()},
            fan_in_fan_out=bool(found.get("fan_in_fan_out")),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{place} has an adapter_config.json without usable r and lora_alpha.",
            str(error)[:200],
            fix="save the adapter again with peft, or correct the file",
        ) from error


def _rank(given: Any) -> int:
    if (rank := int(given)) < 1:
        raise ValueError(f"a rank is a positive number, not {given!r}")
    return rank


def _finite(given: Any) -> float:
    if not math.isfinite(alpha := float(given)):
        raise ValueError(f"alpha is a finite number, not {given!r}")
    return alpha


def _for_module(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first pattern that the end of the module's name fits counts, as in peft."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            continue
    return default


def _refused(headline: str, *facts: str) -> CheckpointError:
    return CheckpointError(
        headline,
        *facts,
        fix="merge it into its base with peft: merge_and_unload(), save_pretrained(); "
        "then name the result",
    )
