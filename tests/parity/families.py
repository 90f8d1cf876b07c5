"""A base and fine-tunes of it, as tiny Llamas in float32, in which no rounding decides anything.

Every weight is a multiple of a power of two, few enough bits long that differences of models are
exact, and within a tensor no two entries of a task vector have the same magnitude: there are no
equals at a cut, whichever arithmetic finds it. `scattered` families are for what sorts differences
of fine-tunes, of which a grid has many equal ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

BASE, TUNED = "base", ("a", "b", "c", "d")
LAYERS = 3


def llama(*, tied: bool = False, hidden: int = 16, vocabulary: int = 40):
    """The module, whose weights are still to be filled in."""
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def make_family(
    folder: Path,
    *,
    step: float,
    dtype: torch.dtype = torch.float32,
    scattered: bool = False,
    **sizes,
) -> Path:
    """Write `base` and its fine-tunes; a fine-tune's largest changes are about 1000 steps."""
    model = llama(**sizes).to(dtype)
    change = _scattered if scattered else _change
    for number, name in enumerate((BASE, *TUNED)):
        with torch.no_grad():
            for key, param in model.named_parameters():
                param.copy_(_start(key, param.shape) + step * change(key, param.shape, number))
        model.save_pretrained(folder / name)
    return folder


def _start(key: str, shape: torch.Size) -> Tensor:
    draw = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randint(-512, 513, shape, generator=draw) / 256.0


def _change(key: str, shape: torch.Size, number: int) -> Tensor:
    """Zero for the base; else 1, 2, 3, ... in any order, with any signs."""
    if number == 0:
        return torch.zeros(shape)
    draw = torch.Generator().manual_seed(1000 * number + zlib.crc32(key.encode()))
    order = torch.randperm(shape.numel(), generator=draw) + 1
    signs = torch.randint(0, 2, (shape.numel(),), generator=draw) * 2 - 1
    return (order * signs).reshape(shape).float()


def _scattered(key: str, shape: torch.Size, number: int) -> Tensor:
    draw = torch.Generator().manual_seed(1000 * number + zlib.crc32(key.encode()))
    return min(number, 1) * 500 * torch.randn(shape, generator=draw)


def off_by(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """By key, the largest difference divided by the largest value."""
    assert set(found) == set(expected)
    return {
        key: float((found[key].double() - x.double()).abs().amax() / x.double().abs().amax())
        for key, x in expected.items()
    }


def in_family(given: Any, family: Path, key: str = "") -> Any:
    """A recipe, or a part of one, with a family's models in place of their names."""
    if isinstance(given, dict):
        return {k: in_family(v, family, k) for k, v in given.items()}
    if isinstance(given, list):
        return [in_family(one, family, key) for one in given]
    named = key in ("model", "base_model") and given in (BASE, *TUNED)
    return str(family / given) if named else given
