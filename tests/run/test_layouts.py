"""The same model with its experts fused and apart, against transformers' own conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from run.family import same_tensors, save_model, tensors_at
from safetensors.torch import save_file
from torch import Tensor, nn

import distmerge
from distmerge.errors import KeyMismatch
from distmerge.run.merge import plan

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}


def mixtral(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=12, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen_moe(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"num_experts": 3, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
    config = transformers.Qwen3MoeConfig(**SIZES, **sizes, decoder_sparse_step=1)
    return transformers.Qwen3MoeForCausalLM(config)


MODELS = {"mixtral": mixtral, "qwen3_moe": qwen_moe}


def fused(model: nn.Module, folder: Path) -> str:
    """As transformers 5 has it in memory."""
    folder.mkdir()
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(folder)
    return str(folder)


def apart(model: nn.Module, folder: Path) -> str:
    """As the Hub's files are."""
    model.save_pretrained(folder)
    assert any(".experts.11." in key or ".experts.2." in key for key in tensors_at(folder))
    return str(folder)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("base_is_fused", [True, False])
def test_layouts_are_bridged_and_the_bases_is_kept(tmp_path, kind, base_is_fused):
    first, second = MODELS[kind](0), MODELS[kind](1)
    ways = (fused, apart) if base_is_fused else (apart, fused)
    places = [way(m, tmp_path / n) for way, m, n in zip(ways, (first, second), "ab", strict=True)]
    what = distmerge.soup([distmerge.open(place) for place in places])
    decided = plan(what)
    assert set(decided.weight_map) == set(tensors_at(places[0]))
    reasons = {s.key: s.reason for s in decided.skipped}
    assert reasons
    assert all(reason.startswith("read as") for reason in reasons.values())
    what.save(tmp_path / "out")
    loaded = type(first).from_pretrained(tmp_path / "out").state_dict()
    for key, tensor in first.state_dict().items():
        mean = (tensor.double() + second.state_dict()[key].double()) / 2
        assert torch.allclose(loaded[key].double(), mean, atol=1e-7), key


def test_a_bridge_gives_the_bits_of_one_layout(tmp_path):
    models = [mixtral(seed) for seed in range(3)]
    all_fused = [fused(model, tmp_path / f"fused{i}") for i, model in enumerate(models)]
    mixed = [all_fused[0], apart(models[1], tmp_path / "apart"), all_fused[2]]
    for name, places in (("mixed", mixed), ("same", all_fused)):
        distmerge.ties([distmerge.open(p) for p in places], k=0.4).save(tmp_path / name)
    assert same_tensors(tensors_at(tmp_path / "mixed"), tensors_at(tmp_path / "same")) == []


def test_experts_with_8_bit_codes_are_joined_too(tmp_path):
    model = qwen_moe(0)
    base = fused(model, tmp_path / "base")
    place = apart(qwen_moe(1), tmp_path / "other")
    tensors: dict[str, Tensor] = {}
    meant = {}
    for key, tensor in tensors_at(place).items():
        if ".experts." in key:
            code = (tensor * 100).to(torch.float8_e4m3fn)
            tensors |= {key: code, f"{key}_scale_inv": torch.full((1, 1), 0.01)}
            meant[key] = code.float() * 0.01
        else:
            tensors[key] = tensor
    save_file(tensors, Path(place) / "model.safetensors", {"format": "pt"})
    config = json.loads(Path(place, "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    Path(place, "config.json").write_text(json.dumps(config))
    what = 0 * distmerge.open(base) + distmerge.open(place)
    found = what.collect(["model.layers.1.mlp.experts.gate_up_proj"])
    stem = "model.layers.1.mlp.experts"
    wanted = torch.stack(
        [
            torch.cat([meant[f"{stem}.{e}.{half}_proj.weight"] for half in ("gate", "up")])
            for e in range(3)
        ]
    )
    assert torch.equal(found[f"{stem}.gate_up_proj"], wanted)


def test_layouts_that_differ_by_more_are_refused_by_name(tmp_path):
    keys = {"model.layers.0.mlp.experts.gate_up_proj": torch.ones(3, 16, 16)}
    base = save_model(keys, tmp_path / "base")
    other = {
        f"model.layers.0.mlp.experts.{e}.{half}_proj.weight": torch.ones(5, 16)
        for e in range(3)
        for half in ("gate", "up")
    }
    place = save_model(other, tmp_path / "other")
    for folder in (base, place):
        Path(folder, "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    with pytest.raises(KeyMismatch, match="another layout than the base") as refused:
        plan(distmerge.soup([distmerge.open(base), distmerge.open(place)]))
    assert "gate_up_proj" in str(refused.value)
    assert "save_pretrained" in str(refused.value.fix)
