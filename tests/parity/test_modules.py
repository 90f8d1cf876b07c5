"""Recipes with `modules`, beside mergekit 0.1.5, which leaves out what lies in no module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity.families import off_by
from parity.oracle import Job, mergekit_merges
from safetensors.torch import load_file

import distmerge

pytestmark = [pytest.mark.full, pytest.mark.timeout(3000)]


def t5(place: Path, seed: int) -> str:
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(place)
    return str(place)


def test_encoder_and_decoder_of_t5(tmp_path):
    a, b = (t5(tmp_path / name, seed) for seed, name in enumerate("ab"))

    def blend(share: float) -> dict[str, Any]:
        weights = {a: share, b: 1.0 - share}
        return {"models": [{"model": m, "parameters": {"weight": w}} for m, w in weights.items()]}

    modules = {"encoder": blend(0.25), "decoder": blend(0.75)}
    recipe = {"merge_method": "linear", "modules": modules, "dtype": "float32"}
    theirs = mergekit_merges([Job("t5", recipe)], tmp_path / "mergekit")["t5"]
    assert isinstance(theirs, dict), theirs
    distmerge.merge(recipe, str(tmp_path / "out"))
    ours = load_file(tmp_path / "out/model.safetensors")
    assert set(ours) - set(theirs) == {"shared.weight"}
    assert set(theirs) <= set(ours)
    assert max(off_by({key: ours[key] for key in theirs}, theirs).values()) <= 1e-5
    first, second = (load_file(f"{model}/model.safetensors") for model in (a, b))
    expected = 0.25 * first["shared.weight"] + 0.75 * second["shared.weight"]
    assert torch.allclose(ours["shared.weight"], expected), "with the encoder, the first module"
