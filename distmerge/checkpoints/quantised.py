"""Which quantised models can be merged, and what to do about the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from distmerge.checkpoints.scales import quantization
from distmerge.checkpoints.tensors import Checkpoint
from distmerge.errors import CheckpointError

_PACKED = re.compile(
    r"(^|[._])(qweight|qzeros|weight_packed|weight_shape|absmax|quant_map|SCB|codebooks|codes"
    r"|qinvscale|\w*_blocks|trellis|suh)$"
)
"""What tensors of packed weights are called."""
_ENDS = (
    *("qweight", "qzeros", "weight_packed", "weight_shape", "absmax", "quant_map", "SCB"),
    *("codebooks", "codes", "qinvscale", "_blocks", "trellis", "suh"),
)
"""How such names end: that look spares most keys the search."""
_ORIGINAL = "merge the model that it was quantised from"
_MENDS = {
    "bitsandbytes": "load it with transformers, then model.dequantize() and save_pretrained(), "
    "and name the result",
    "mxfp4": "from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True)), "
    "save_pretrained(), and name the result",
    "compressed-tensors": "from_pretrained(..., quantization_config="
    "CompressedTensorsConfig(run_compressed=False)), save_pretrained(), and name the result",
}
_SPELLINGS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors",
}


def refuse_packed(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a model whose weights are quantised in a way that isn't read.

    8-bit floats are; a config that speaks of quantising weights which the files hold as floats
    says how to load them, no more.
    """
    packed = _evidence(checkpoint)
    if packed is None:
        return
    section = quantization(checkpoint.config)
    method = str(section.get("quant_method", "")).lower().replace("_", "-") or _guess(packed)
    name = _SPELLINGS.get(method, method or "an unknown method")
    said = section.get("format") or section.get("quant_algo") or section.get("bits")
    raise CheckpointError(
        f"{checkpoint.url} is quantised with {name}, and such weights can't be merged.",
        f"its weights are packed: {packed[:200]}",
        *([f"its config says {said}"] if said else []),
        "8-bit floats (FP8) are the quantised weights that are read",
        fix=_MENDS.get(method, _ORIGINAL),
    )


def _evidence(checkpoint: Checkpoint) -> str | None:
    """A tensor that shows that weights are packed."""
    tensors = checkpoint.tensors
    for key, info in tensors.items():
        named = key.endswith(_ENDS) and _PACKED.search(key)
        if info.is_float and not named:
            continue
        if named and _has_sibling(key, tensors):
            return key
        weight = key.endswith((".weight", "_proj")) and len(info.shape) > 1 and not info.is_float
        if weight and info.dtype in ("I8", "U8", "I32", "U32", "I16", "U16"):
            return key
    return None


_SIBLINGS = (
    "scales",
    "qzeros",
    "weight_scale",
    "weight_shape",
    "absmax",
    "weight",
    "svh",
    "qweight",
)


def _has_sibling(key: str, tensors: Mapping[str, Any]) -> bool:
    """Are there scales or codes beside it, so that the name is no accident?"""
    stem = key.rpartition(".")[0]
    if key.endswith("_blocks"):
        return key.removesuffix("_blocks") + "_scales" in tensors
    if ".weight." in f"{key}." or key.endswith("SCB"):
        return True
    return any(f"{stem}.{name}" in tensors and f"{stem}.{name}" != key for name in _SIBLINGS)


def _guess(packed: str) -> str:
    last = packed.rpartition(".")[2]
    if last in ("qweight", "qzeros"):
        return "gptq"
    if last in ("absmax", "quant_map", "SCB") or ".absmax" in packed:
        return "bitsandbytes"
    return {"weight_packed": "compressed-tensors", "weight_shape": "compressed-tensors"}.get(
        last, ""
    )
