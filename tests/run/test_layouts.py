"""The same model with its experts fused and apart, against transformers' own conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from methods import formulas
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


Tensors = dict[str, Tensor]


def cut_apart(state: Tensors) -> Tensors:
    """Mixtral's tensors by the names of its first files, cut by hand."""
    found: Tensors = {}
    for key, tensor in state.items():
        stem = key.rpartition(".experts.")[0].replace(".mlp", ".block_sparse_moe")
        for e, own in enumerate(tensor if ".experts." in key else ()):
            parts = {"w2": own}
            if key.endswith("gate_up_proj"):
                parts = {"w1": own[: len(own) // 2], "w3": own[len(own) // 2 :]}
            for name, part in parts.items():
                found[f"{stem}.experts.{e}.{name}.weight"] = part.contiguous()
        if ".experts." not in key:
            found[key.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tensor
    return found


def older(model: nn.Module, folder: Path) -> str:
    """As Mixtral's files were before transformers 5, which has no part in writing them."""
    folder.mkdir()
    save_file(cut_apart(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(folder)
    return str(folder)


LAYOUTS = {"fused": (fused, older), "apart": (older, fused)}
"""How the base is saved, and how what is merged with it."""


@pytest.fixture(params=LAYOUTS)
def mixed(request, tmp_path):
    """Where a base and two models of the other layout are, and what each holds in the base's."""
    models = [mixtral(seed) for seed in range(3)]
    own, others = LAYOUTS[request.param]
    ways = (own, others, others)
    places = [way(m, tmp_path / n) for way, m, n in zip(ways, models, "xyz", strict=True)]
    states = [dict(model.state_dict()) for model in models]
    return places, states if request.param == "fused" else list(map(cut_apart, states))


def test_transformers_reads_the_older_layout_as_the_model(tmp_path):
    model = mixtral(0)
    loaded = type(model).from_pretrained(older(model, tmp_path / "older")).state_dict()
    assert same_tensors(loaded, model.state_dict()) == []


def test_task_vectors_of_models_in_the_other_layout(mixed, tmp_path):
    places, (base, *others) = mixed
    weight, density = [0.7, 0.6], [0.3, 0.5]
    listed = [
        {"model": place, "parameters": {"weight": w, "density": d}}
        for place, w, d in zip(places[1:], weight, density, strict=True)
    ]
    out = tmp_path / "out"
    distmerge.merge({"merge_method": "ties", "base_model": places[0], "models": listed}, str(out))
    found = tensors_at(out)
    assert found.keys() == base.keys()
    for key, tensor in found.items():
        start = base[key].numpy().astype(np.float64)
        deltas = [(other[key] - base[key]).numpy().astype(np.float64) for other in others]
        trimmed = [formulas.trim(d, k) for d, k in zip(deltas, density, strict=True)]
        exact = formulas.ties([], start, weight=weight, density=density, trimmed=trimmed)
        assert np.allclose(tensor.double().numpy(), exact, rtol=1e-6, atol=1e-7), key


def test_slices_of_models_in_the_other_layout(mixed, tmp_path):
    places, states = mixed
    x, y, z = places

    def source(model: str, first: int, last: int, weight: float) -> dict[str, Any]:
        return {"model": model, "layer_range": [first, last], "parameters": {"weight": weight}}

    slices = [
        {"sources": [source(x, 0, 1, 0.25), source(y, 1, 2, 0.75)]},
        {"sources": [source(z, 0, 2, 1.0)]},
        {"sources": [source(y, 0, 1, 0.5), source(x, 1, 2, 0.5)]},
    ]
    out = tmp_path / "out"
    distmerge.merge({"merge_method": "linear", "base_model": x, "slices": slices}, str(out))
    found = tensors_at(out)
    made_of = [
        ((0, 0, 0.25), (1, 1, 0.75)),
        ((2, 0, 1.0),),
        ((2, 1, 1.0),),
        ((1, 0, 0.5), (0, 1, 0.5)),
    ]
    in_layers = [key for key in states[0] if key.startswith("model.layers.0.")]
    for n, parts in enumerate(made_of):
        for key in in_layers:
            exact = sum(
                weight * states[m][key.replace(".0.", f".{own}.", 1)].double()
                for m, own, weight in parts
            )
            written = found[key.replace(".0.", f".{n}.", 1)]
            assert torch.allclose(written.double(), exact, rtol=1e-6, atol=1e-7), (n, key)
    beside = [key for key in states[0] if ".layers." not in key]
    assert len(found) == len(beside) + 4 * len(in_layers)
    loaded = transformers.MixtralForCausalLM.from_pretrained(out)
    assert loaded.config.num_hidden_layers == 4


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
