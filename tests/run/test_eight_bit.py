"""8-bit floats with scales, in and out: against plain formulas and transformers' own reader."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from run.family import same_tensors, save_model, tensors_at
from run.merging import least_memory
from run.test_inputs import assert_covered
from safetensors.torch import save_file
from torch import Tensor

import distmerge
from distmerge.errors import CheckpointError, DtypeMismatch
from distmerge.run.merge import plan
from distmerge.write.verify import verify

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SHAPES = {"layers.0.up.weight": (1300, 700), "layers.0.wide.weight": (3, 270_001)}


def codes(seed: int, shape: tuple[int, ...], dtype: torch.dtype = E4M3) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=random) * 60).clamp(-400, 400).to(dtype)


def scales(seed: int, shape: tuple[int, ...]) -> Tensor:
    random = torch.Generator().manual_seed(1000 + seed)
    return 0.001 + 0.01 * torch.rand(shape, generator=random)


def spread(scale: Tensor, weight: Tensor, block: tuple[int, int] = (128, 128)) -> Tensor:
    """One scale for each element, by indexing."""
    if scale.numel() == 1:
        return scale.reshape(()).expand(weight.shape)
    if scale.dim() == 1 or scale.shape[-1] == 1:
        return scale.reshape(*weight.shape[:-1], 1).expand(weight.shape)
    down = torch.arange(weight.shape[-2]) // block[0]
    right = torch.arange(weight.shape[-1]) // block[1]
    return scale[..., down, :][..., right]


def scale_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    rows, columns = shape[-2:]
    return {
        "tensor": (),
        "one": (1,),
        "row": (rows,),
        "rows x 1": (rows, 1),
        "block": (math.ceil(rows / 128), math.ceil(columns / 128)),
    }[kind]


def model(seed: int, kind: str, dtype: torch.dtype = E4M3) -> tuple[dict[str, Tensor], Any]:
    """An 8-bit model's tensors, and what they mean in float64."""
    ending = "_scale_inv" if kind == "block" else "_scale"
    tensors: dict[str, Tensor] = {}
    meant = {}
    for i, (key, shape) in enumerate(SHAPES.items()):
        weight, scale = codes(seed + i, shape, dtype), scales(seed + i, scale_shape(kind, shape))
        tensors |= {key: weight, key + ending: scale}
        meant[key] = weight.double() * spread(scale, weight).double()
    norm = torch.randn(63, generator=torch.Generator().manual_seed(seed)).bfloat16()
    tensors["norm.weight"] = norm
    tensors["layers.0.up.input_scale"] = torch.tensor(0.5)
    return tensors, {**meant, "norm.weight": norm.double()}


def configure(place: str, **section: Any) -> str:
    config = {"model_type": "family", "torch_dtype": "bfloat16", "quantization_config": section}
    Path(place, "config.json").write_text(json.dumps(config))
    return place


def saved(folder: Path, seed: int, kind: str, **options: Any) -> tuple[str, Mapping[str, Tensor]]:
    tensors, meant = model(seed, kind, options.pop("dtype", E4M3))
    place = save_model(tensors, folder, **options)
    return configure(place, quant_method="fp8", weight_block_size=[128, 128]), meant


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("kind", ["tensor", "one", "row", "rows x 1", "block"])
@pytest.mark.parametrize("memory", ["much", "little"])
@pytest.mark.usefixtures("fixed_reserve")
def test_weights_are_their_codes_times_their_scales(tmp_path, kind, dtype, memory):
    models, meant = zip(
        *(
            saved(tmp_path / f"m{i}", 10 * i, kind, dtype=dtype, files=1 + 2 * i)  # scales apart
            for i in range(2)
        ),
        strict=True,
    )
    what = distmerge.soup([distmerge.open(place) for place in models])
    assert_covered(plan(what))
    allowed = least_memory(what, workers=2) if memory == "little" else "2GiB"
    what.save(tmp_path / "out", out_dtype="float32", workers=2, allowed_mem=allowed)
    found = tensors_at(tmp_path / "out")
    assert found.keys() == meant[0].keys()
    for key, tensor in found.items():
        mean = (meant[0][key] + meant[1][key]) / 2
        assert torch.allclose(tensor.double(), mean, rtol=1e-6, atol=1e-7), key
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float32"
    reasons = {s.key: s.reason for s in plan(what).skipped}
    assert "activations" in reasons["layers.0.up.input_scale"]
    assert sum("the scale of" in reason for reason in reasons.values()) == 2


def test_an_eight_bit_model_alone_is_written_in_bfloat16(tmp_path):
    place, meant = saved(tmp_path / "m", 0, "block")
    distmerge.open(place).save(tmp_path / "out")
    found = tensors_at(tmp_path / "out")
    for key, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, meant[key].float().bfloat16()), key


def test_eight_bit_and_bfloat16_models_merge(tmp_path):
    place, meant = saved(tmp_path / "m", 0, "block")
    plain = {key: tensor.bfloat16() for key, tensor in meant.items()}
    other = save_model(plain, tmp_path / "plain")
    what = distmerge.ties([distmerge.open(other), distmerge.open(place)], k=1.0)
    what.save(tmp_path / "out", out_dtype="float32")
    for key, tensor in tensors_at(tmp_path / "out").items():
        assert torch.allclose(tensor.double(), meant[key], rtol=1e-2, atol=1e-3), key


@pytest.mark.parametrize("scale", [(4, 2, 2), (4,), (4, 1, 1), (4, 200), (4, 200, 1)])
def test_fused_experts_have_scales_of_their_own(tmp_path, scale):
    weight, given = codes(0, (4, 200, 150)), scales(0, scale)
    key = "mlp.experts.gate_up_proj"
    place = save_model({key: weight, f"{key}_scale_inv": given}, tmp_path / "m")
    configure(place, quant_method="fp8", weight_block_size=[128, 128])
    found = distmerge.open(place).collect()[key]
    full = spread(given, weight) if scale in [(4, 2, 2), (4, 200, 1)] else None
    if full is None:
        full = given.reshape(4, -1, 1).expand(weight.shape)
    assert torch.equal(found, (weight.float() * full).bfloat16())


def test_plain_casts_need_no_scales(tmp_path):
    weight = codes(0, (30, 20))
    place = save_model({"a.weight": weight}, tmp_path / "m")
    assert torch.equal(distmerge.open(place).collect()["a.weight"], weight.bfloat16())


def test_a_scale_that_is_missing_or_doesnt_fit_is_named(tmp_path):
    tensors, _ = model(0, "block")
    del tensors["layers.0.up.weight_scale_inv"]
    place = configure(save_model(tensors, tmp_path / "m"), quant_method="fp8")
    with pytest.raises(DtypeMismatch, match=r"layers\.0\.up\.weight is F8_E4M3"):
        plan(distmerge.open(place))
    tensors["layers.0.up.weight_scale_inv"] = torch.ones(7, 9)
    place = configure(save_model(tensors, tmp_path / "other"), quant_method="fp8")
    with pytest.raises(DtypeMismatch, match=r"layers\.0\.up\.weight is F8_E4M3"):
        plan(distmerge.open(place))


def test_a_lora_adapter_on_an_eight_bit_base(tmp_path):
    place, meant = saved(tmp_path / "m", 0, "block")
    a, b = torch.randn(2, 700), torch.randn(1300, 2)
    (tmp_path / "lora").mkdir()
    name = "base_model.model.layers.0.up.lora_"
    save_file(
        {f"{name}A.weight": a, f"{name}B.weight": b},
        tmp_path / "lora/adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    distmerge.open(f"{place}+{tmp_path}/lora").save(tmp_path / "out", out_dtype="float32")
    found = tensors_at(tmp_path / "out")
    key = "layers.0.up.weight"
    wanted = meant[key] + 0.5 * b.double() @ a.double()
    assert torch.allclose(found[key].double(), wanted, rtol=1e-5, atol=1e-5)


PACKED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "gptq": (
        {"a.qweight": torch.ones(8, 8, dtype=torch.int32), "a.qzeros": torch.ones(1, 8).int()},
        {"quant_method": "gptq", "bits": 4},
        "GPTQ",
    ),
    "gptq without a config": (
        {"a.qweight": torch.ones(8, 8, dtype=torch.int32), "a.qzeros": torch.ones(1, 8).int()},
        {},
        "GPTQ",
    ),
    "awq": (
        {"a.qweight": torch.ones(8, 8, dtype=torch.int32), "a.scales": torch.ones(1, 8)},
        {"quant_method": "awq"},
        "AWQ",
    ),
    "4 bits": (
        {"a.weight": torch.ones(32, 1).byte(), "a.weight.absmax": torch.ones(1)},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "bitsandbytes",
    ),
    "8 bits": (
        {"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.SCB": torch.ones(4)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "bitsandbytes",
    ),
    "mxfp4": (
        {
            "e.gate_up_proj_blocks": torch.ones(2, 4, 4, 16).byte(),
            "e.gate_up_proj_scales": torch.ones(2, 4, 4).byte(),
        },
        {"quant_method": "mxfp4"},
        "MXFP4",
    ),
    "int4": (
        {"a.weight_packed": torch.ones(4, 4).int(), "a.weight_scale": torch.ones(4, 1)},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "compressed-tensors",
    ),
    "int8": (
        {"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1)},
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        "compressed-tensors",
    ),
    "hqq": ({"a.weight": torch.ones(4, 4).byte()}, {"quant_method": "hqq"}, "hqq"),
}


@pytest.mark.parametrize("kind", PACKED)
def test_other_quantised_weights_are_refused_by_name_before_anything_is_read(tmp_path, kind):
    tensors, section, name = PACKED[kind]
    place = configure(save_model(tensors, tmp_path / "m"), **section)
    other = save_model({"a.weight": torch.ones(4, 4)}, tmp_path / "plain")
    recipe = {
        "merge_method": "linear",
        "parameters": {"weight": 1.0},
        "models": [{"model": other}, {"model": place}],
    }
    with pytest.raises(CheckpointError, match=name) as refused:
        plan(recipe)
    assert refused.value.fix
    assert place in str(refused.value)


def test_a_config_that_only_says_how_to_load_is_no_obstacle(tmp_path):
    place = save_model({"a.weight": torch.ones(4, 4)}, tmp_path / "m")
    configure(place, quant_method="bitsandbytes", load_in_4bit=True)
    distmerge.open(place).save(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize("alone", [True, False])
def test_gguf_is_refused_by_name(tmp_path, alone):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match="GGUF"):
        distmerge.open(tmp_path / "model.gguf" if alone else tmp_path)


# --- written in 8 bits


def fitted(meant: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, block by block, as DeepSeek's models have them."""
    rows, columns = meant.shape
    shape = (math.ceil(rows / 128), math.ceil(columns / 128))
    scale, code = torch.empty(shape), torch.empty(meant.shape, dtype=E4M3)
    for i in range(shape[0]):
        for j in range(shape[1]):
            here = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            block = meant[here].float()
            scale[i, j] = block.abs().max() / 448 if block.any() else 1.0
            code[here] = (block / scale[i, j]).to(E4M3)
    return code, scale


@pytest.mark.parametrize("memory", ["much", "little"])
@pytest.mark.usefixtures("fixed_reserve")
def test_codes_are_written_with_fresh_scales_of_the_merge(tmp_path, memory):
    models, meant = zip(
        *(saved(tmp_path / f"m{i}", 10 * i, "block") for i in range(2)), strict=True
    )
    what = distmerge.soup([distmerge.open(place) for place in models])
    options: dict[str, Any] = {"out_dtype": "float8_e4m3fn", "workers": 2}
    if memory == "little":
        what.save(tmp_path / "much", **options)
        options["allowed_mem"] = least_memory(what, **options)
    what.save(tmp_path / "out", **options)
    found = tensors_at(tmp_path / "out")
    assert set(found) == set(meant[0]) | {f"{k}_scale_inv" for k in SHAPES}
    assert found["norm.weight"].dtype == torch.bfloat16
    plain = what.collect()
    what.save(tmp_path / "float", out_dtype="float32", workers=1)
    exact = tensors_at(tmp_path / "float")
    for key in SHAPES:
        code, scale = fitted(exact[key])
        assert torch.equal(found[f"{key}_scale_inv"], scale), key
        assert torch.equal(found[key].view(torch.uint8), code.view(torch.uint8)), key
        assert plain[key].dtype == torch.bfloat16
    if memory == "little":
        assert same_tensors(found, tensors_at(tmp_path / "much")) == []
    config = json.loads((tmp_path / "out/config.json").read_text())
    section = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128] * 2,
    }
    assert config["quantization_config"] == section
    assert config["torch_dtype"] == "bfloat16"
    again = distmerge.open(tmp_path / "out").collect()
    for key in SHAPES:
        wanted = (meant[0][key] + meant[1][key]) / 2
        assert torch.allclose(again[key].double(), wanted, rtol=0.08, atol=0.01), key
    assert verify(str(tmp_path / "out")).problems == []


@pytest.mark.usefixtures("fixed_reserve")
def test_shard_size_workers_and_engines_change_no_code(tmp_path):
    place, _ = saved(tmp_path / "m", 0, "block")
    other, _ = saved(tmp_path / "n", 5, "row")
    what = distmerge.ties([distmerge.open(place), distmerge.open(other)], k=0.4)
    ways: dict[str, dict[str, Any]] = {
        "one": {"workers": 1},
        "three": {"workers": 3, "max_shard_size": "1MB"},
    }
    for name, options in ways.items():
        what.save(tmp_path / name, out_dtype="float8_e4m3fn", **options)
    assert same_tensors(tensors_at(tmp_path / "one"), tensors_at(tmp_path / "three")) == []
    index = json.loads((tmp_path / "three/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert all(index[key] == index[f"{key}_scale_inv"] for key in SHAPES)


def test_models_without_codes_get_them_where_8_bit_models_have_them(tmp_path):
    random = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (256, 128),
        "model.layers.0.self_attn.q_proj.weight": (256, 128),
        "model.layers.0.mlp.gate_proj.weight": (384, 128),
        "model.layers.0.mlp.gate.weight": (128, 128),
        "model.layers.0.mlp.odd.weight": (130, 128),
        "model.layers.0.input_layernorm.weight": (128,),
        "lm_head.weight": (256, 128),
    }
    tensors = {k: torch.randn(s, generator=random).bfloat16() for k, s in shapes.items()}
    tensors["model.layers.0.mlp.gate_proj.weight"][128:256] = 0
    place = save_model(tensors, tmp_path / "m")
    recipe = {
        "merge_method": "linear",
        "models": [{"model": place, "parameters": {"weight": 1.0}}],
        "out_dtype": "float8_e4m3fn",
    }
    distmerge.merge(recipe, str(tmp_path / "out"))
    found = tensors_at(tmp_path / "out")
    coded = {key for key, tensor in found.items() if tensor.dtype == E4M3}
    assert {key.split(".")[-2] for key in coded} == {"q_proj", "gate_proj"}
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert set(section["modules_to_not_convert"]) == {
        *("model.embed_tokens", "lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.odd")
    }
    for key in coded:
        code, scale = fitted(tensors[key])
        assert torch.equal(found[f"{key}_scale_inv"], scale)
        assert torch.equal(found[key].view(torch.uint8), code.view(torch.uint8))


def test_transformers_reads_the_codes_as_we_mean_them(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
        pad_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "m")
    distmerge.open(tmp_path / "m").save(tmp_path / "out", out_dtype="float8_e4m3fn")
    wanted = distmerge.open(tmp_path / "out").collect()
    loaded = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    )
    for key, tensor in loaded.state_dict().items():
        if key in wanted:
            assert torch.allclose(tensor.float(), wanted[key].float(), rtol=1e-2, atol=1e-6), key
    before = model.state_dict()
    for key in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
        assert not torch.equal(loaded.state_dict()[key].float(), before[key])
        assert torch.allclose(loaded.state_dict()[key].float(), before[key], rtol=0.07, atol=1e-3)
