"""8-bit floats and their scales: which scale is whose, and the weight that both make.

A weight is its codes times its scale. Scales come one for a tensor, one for each row, or one for
each block of rows and columns; all are called by the weight's name and an ending.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distmerge.checkpoints.tensors import Checkpoint, TensorInfo
from distmerge.checkpoints.views import Need, Part, Plain, Span, View, wide

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = (128, 128)
"""Rows and columns of a block, where a config doesn't say."""
_ENDINGS = ("_scale_inv", "_scale")
_OF_WEIGHT = (".scale_weight", ".qscale_weight")
"""Other spellings, in the place of `.weight`."""
_ACTIVATIONS = (
    *(".input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale", ".prob_output_scale"),
    *(".activation_scale", ".qscale_act", "_input_scale", ".input_scale_ub", "_activation_scale"),
)
_UNQUANTISED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Scaled(View):
    """8-bit codes times their scales."""

    codes: Part
    scales: Part
    block: tuple[int, int]
    """Rows and columns that share a scale, within each matrix of the last two dimensions."""

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        return self.codes, self.scales

    @property
    def coded(self) -> bool:
        return True

    @property
    def fixed(self) -> int:
        return self.scales.info.nbytes

    @property
    def row(self) -> int:
        return self.shape[-1] if self.shape else 1

    def needs(self, span: Span) -> list[Need]:
        return [(0, span), (1, (0, self.scales.info.elements))]

    def values(self, span: Span, pieces: Sequence[Tensor]) -> Tensor:
        codes, scales = pieces
        value: Tensor = codes.to(wide(self.dtype, codes))
        scales = scales.to(value.dtype)
        if scales.numel() == 1:
            return value.mul_(scales)
        height, across = self.block
        outputs = self.shape[-2]
        down = -(-outputs // height)
        first, last = self.rows(span)
        rows = [r // outputs * down + r % outputs // height for r in range(first, last)]
        spread = scales.view(-1, -(-self.row // across))[rows]
        spread = spread.repeat_interleave(across, dim=1)[:, : self.row].reshape(-1)
        return value.mul_(spread[self.within(span)])


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its 8-bit floats as the numbers that they and their scales mean.

    Tensors whose scale isn't found stay as they are; whoever merges them is told.
    """
    coded = [key for key, info in checkpoint.tensors.items() if info.dtype.startswith("F8_")]
    if not coded:
        return checkpoint
    dtype = _written(checkpoint.config)
    found = {key: scale_of(key, checkpoint.tensors) for key in coded}
    if not any(found.values()) and not quantization(checkpoint.config):
        # Codes without scales anywhere are plain numbers, cast.
        cast = {
            k: Plain(dtype, checkpoint.tensors[k].shape, Part(checkpoint.tensors[k])) for k in coded
        }
        return replace(checkpoint, views={**checkpoint.views, **cast})
    views: dict[str, View] = {}
    used: dict[str, str] = {}
    for key, scale in found.items():
        if scale is None:
            continue
        codes, scales = checkpoint.tensors[key], checkpoint.tensors[scale]
        block = _block(codes.shape, scales.shape, checkpoint.config)
        if block is not None:
            views[key] = Scaled(dtype, codes.shape, Part(codes), Part(scales), block)
            used[scale] = f"the scale of {key}, which is read with it"
    used |= {
        key: "a scale of activations, which only the quantised model has"
        for key in checkpoint.tensors
        if key.endswith(_ACTIVATIONS) and key not in used
    }
    blocks = sorted({view.block for view in views.values() if isinstance(view, Scaled)})
    return replace(
        checkpoint,
        views={**checkpoint.views, **views},
        used={**checkpoint.used, **used},
        settings="\n".join([checkpoint.settings, f"dequantised {blocks}"]).strip(),
    )


def scale_of(key: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The key of a weight's scale."""
    stem = key.removesuffix(".weight")
    spellings = [key + ending for ending in _ENDINGS]
    spellings += [stem + ending for ending in _OF_WEIGHT] if stem != key else []
    return next((name for name in spellings if name in tensors and tensors[name].is_float), None)


def quantization(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A config's section on how the weights are quantised; empty without one."""
    for part in (config or {}, (config or {}).get("text_config") or {}):
        for name in ("quantization_config", "compression_config"):
            if isinstance(part, Mapping) and isinstance(part.get(name), Mapping) and part[name]:
                section: Mapping[str, Any] = part[name]
                return section
    return {}


def _written(config: Mapping[str, Any] | None) -> str:
    """What the weights were before: a config says it, and bfloat16 is usual."""
    text = (config or {}).get("text_config")
    for part in (config or {}, text if isinstance(text, Mapping) else {}):
        named = part.get("dtype", part.get("torch_dtype"))
        if isinstance(named, str) and named.removeprefix("torch.") in _UNQUANTISED:
            return _UNQUANTISED[named.removeprefix("torch.")]
    return "BF16"


def _block(
    weight: tuple[int, ...], scale: tuple[int, ...], config: Mapping[str, Any] | None
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None if the shapes don't fit."""
    if all(n == 1 for n in scale):
        return weight[-2:] if len(weight) > 1 else (1, weight[0] if weight else 1)  # type: ignore[return-value]
    if len(weight) < 2:
        return None
    lead, (outputs, inputs) = weight[:-2], weight[-2:]
    if scale in ((*lead, outputs), (*lead, outputs, 1)):
        return 1, inputs
    if lead and scale in (lead, (*lead, 1), (*lead, 1, 1)):
        return outputs, inputs
    if len(scale) != len(weight) or scale[:-2] != lead:
        return None
    for height, across in (_said(config), BLOCK):
        if scale[-2:] == (-(-outputs // height), -(-inputs // across)):
            return height, across
    down, right = scale[-2:]
    if down and right and outputs % down == 0 and inputs % right == 0:
        return outputs // down, inputs // right
    return None


def _said(config: Mapping[str, Any] | None) -> tuple[int, int]:
    said = quantization(config).get("weight_block_size")
    if (
        isinstance(said, list | tuple)
        and len(said) == 2
        and all(type(n) is int and n > 0 for n in said)
    ):
        return said[0], said[1]
    return BLOCK
