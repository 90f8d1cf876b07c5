"""Checkpoints as they really lie: any offset, any strides, other names, other formats."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from run.family import BF16, F32, on_grid, same_tensors, save_model, tensors_at
from run.merging import assert_covered, least_memory
from torch import Tensor

import distmerge
from distmerge.checkpoints.tensors import Checkpoint
from distmerge.errors import KeyMismatch
from distmerge.expressions.nodes import Leaf
from distmerge.plan.plan import Plan
from distmerge.run.merge import plan

NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}


def gpt2_tensors(seed: int, *, dtype: torch.dtype = F32) -> dict[str, Tensor]:
    """A GPT-2's parameters, as `GPT2Model` spells them."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"wte.weight": (50, 8), "wpe.weight": (16, 8)}
    for layer in range(2):
        h = f"h.{layer}."
        shapes |= {h + "ln_1.weight": (8,), h + "ln_1.bias": (8,)}
        shapes |= {h + "attn.c_attn.weight": (8, 24), h + "attn.c_attn.bias": (24,)}
        shapes |= {h + "mlp.c_fc.weight": (8, 32), h + "mlp.c_proj.weight": (32, 8)}
    shapes |= {"ln_f.weight": (8,), "ln_f.bias": (8,)}
    return {
        key: on_grid(torch.randn(shape, generator=random)).to(dtype)
        for key, shape in shapes.items()
    }


def masks() -> dict[str, Tensor]:
    """The buffers that old GPT-2 checkpoints hold."""
    triangle = torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16)
    keys = {f"h.{layer}.attn.bias": triangle.clone() for layer in range(2)}
    return keys | {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}


def write_unpadded(tensors: Mapping[str, Tensor], folder: Path, shift: int) -> str:
    """A safetensors file whose header is not padded: tensors begin at any byte."""
    header: dict[str, Any] = {}
    at = 0
    for key, tensor in tensors.items():
        place = [at, at + tensor.nbytes]
        header[key] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": place,
        }
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * ((shift - len(text)) % 8)
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return str(folder)


def named(plan: Plan, name: str) -> Checkpoint:
    found = next(leaf for leaf in plan.inputs.leaves if str(leaf) == name)
    assert isinstance(found, Leaf)
    return found.checkpoint


@pytest.mark.parametrize("shift", [1, 2, 4, 7])
@pytest.mark.parametrize("memory", ["much", "little"])
@pytest.mark.usefixtures("fixed_reserve")
def test_tensors_may_begin_at_any_byte(tmp_path, shift, memory):
    random = torch.Generator().manual_seed(0)
    models = []
    for i in range(3):
        tensors = {
            "odd": torch.arange(1, dtype=torch.int64),
            "byte": on_grid(torch.randn(3, 7, generator=random)).to(BF16),
            "large": on_grid(torch.randn(700, 1025, generator=random)),
            "double": torch.randn(63, 5, generator=random, dtype=torch.float64),
            "long": on_grid(torch.randn(3, 270_001, generator=random)).to(BF16),
        }
        write_unpadded(tensors, tmp_path / f"odd{i}", shift + i)
        models.append(save_model(tensors, tmp_path / f"even{i}"))
    odd = distmerge.ties([distmerge.open(tmp_path / f"odd{i}") for i in range(3)], k=0.5)
    even = distmerge.ties([distmerge.open(model) for model in models], k=0.5)
    options = {"workers": 2}
    allowed = least_memory(odd, **options) if memory == "little" else "2GiB"
    odd.save(tmp_path / "a", allowed_mem=allowed, **options)
    even.save(tmp_path / "b", **options)
    assert same_tensors(tensors_at(tmp_path / "a"), tensors_at(tmp_path / "b")) == []


@pytest.mark.parametrize("memory", ["much", "little"])
@pytest.mark.usefixtures("fixed_reserve")
def test_strided_tensors_of_bin_files_merge_as_contiguous_ones_do(tmp_path, memory):
    plain, strided = [], []
    for i in range(3):
        random = torch.Generator().manual_seed(i)
        whole = on_grid(torch.randn(5, 70, 1025, generator=random))
        views = {
            "transposed": on_grid(torch.randn(1025, 700, generator=random)).t(),
            "permuted": whole.permute(2, 0, 1),
            "sliced": whole[1:4, ::2, 3:],
            "every third": on_grid(torch.randn(900_000, generator=random))[::3].bfloat16(),
            "plain": on_grid(torch.randn(63, generator=random)),
            "last column": whole[:, :, -1],
            "copied": torch.arange(1200).view(30, 40).t(),
        }
        (tmp_path / f"bin{i}").mkdir()
        torch.save(views, tmp_path / f"bin{i}/pytorch_model.bin")
        strided.append(str(tmp_path / f"bin{i}"))
        solid = {key: view.contiguous() for key, view in views.items()}
        plain.append(save_model(solid, tmp_path / f"plain{i}"))
    what = distmerge.ties([distmerge.open(model) for model in strided], k=0.5)
    decided = plan(what)
    kinds = [info.strides for task in decided.units[0].tasks for info in task.inputs.values()]  # type: ignore[union-attr]
    assert sum(strides is not None for strides in kinds) >= 12
    allowed = least_memory(what, workers=2) if memory == "little" else "2GiB"
    what.save(tmp_path / "a", allowed_mem=allowed, workers=2)
    distmerge.ties([distmerge.open(model) for model in plain], k=0.5).save(tmp_path / "b")
    assert same_tensors(tensors_at(tmp_path / "a"), tensors_at(tmp_path / "b")) == []


@pytest.fixture
def gpt2s(tmp_path) -> list[str]:
    """A base without prefix but with masks, a .bin with prefix, masks and a tied head, and a
    safetensors one with prefix."""
    base = gpt2_tensors(0)
    save_model({**base, **masks()}, tmp_path / "base")
    wrapped = {f"transformer.{k}": t for k, t in (gpt2_tensors(1) | masks()).items()}
    wrapped["lm_head.weight"] = wrapped["transformer.wte.weight"]  # the same storage
    (tmp_path / "law").mkdir()
    torch.save(wrapped, tmp_path / "law/pytorch_model.bin")
    save_model({f"transformer.{k}": t for k, t in gpt2_tensors(2).items()}, tmp_path / "food")
    for name in ("base", "law", "food"):
        config = {"model_type": "gpt2", "tie_word_embeddings": True}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return [str(tmp_path / name) for name in ("base", "law", "food")]


def test_gpt2s_of_three_layouts_merge_and_every_tensor_is_accounted_for(gpt2s, tmp_path):
    what = distmerge.soup([distmerge.open(path) for path in gpt2s])
    decided = plan(what)
    assert_covered(decided)
    reasons = {(s.model, s.key): s.reason for s in decided.skipped}
    buffers = {("base", key) for key in masks()} | {("law", f"transformer.{k}") for k in masks()}
    assert set(reasons) == buffers | {("law", "lm_head.weight")}
    assert "mask buffer" in reasons["base", "h.0.attn.bias"]
    assert "mask value" in reasons["law", "transformer.h.1.attn.masked_bias"]
    assert "alias of transformer.wte.weight" in reasons["law", "lm_head.weight"]
    assert [m.split(": ")[0] for m in decided.inputs.mappings] == ["law", "food"]
    what.save(tmp_path / "out")
    merged = tensors_at(tmp_path / "out")
    parts = [gpt2_tensors(seed) for seed in range(3)]
    assert set(merged) == set(parts[0])
    for key, tensor in merged.items():
        mean = sum(part[key].double() for part in parts) / 3
        assert torch.allclose(tensor.double(), mean, atol=1e-6), key
    manifest = json.loads((tmp_path / "out/distmerge.json").read_text())
    assert {(s["model"], s["key"]) for s in manifest["skipped"]} == set(reasons)
    assert manifest["mappings"] == list(decided.inputs.mappings)


def test_in_a_shard_that_is_read_whole_aliases_and_old_files_merge_too(gpt2s, tmp_path):
    tensors = gpt2_tensors(3)
    tied = {**tensors, "lm_head.weight": tensors["wte.weight"]}
    (tmp_path / "old").mkdir()
    torch.save(tied, tmp_path / "old/pytorch_model.bin", _use_new_zipfile_serialization=False)
    what = distmerge.soup([distmerge.open(gpt2s[0]), distmerge.open(tmp_path / "old")])
    assert_covered(plan(what))
    what.save(tmp_path / "out")
    base = gpt2_tensors(0)
    for key, tensor in tensors_at(tmp_path / "out").items():
        assert torch.allclose(tensor, (base[key] + tensors[key]) / 2, atol=1e-6), key


def with_config(tensors: Mapping[str, Tensor], folder: Path, config: Mapping[str, Any]) -> str:
    place = save_model(tensors, folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 50, **config}))
    return place


@pytest.mark.parametrize("said", [{"tie_word_embeddings": True}, {"transformers_version": "4.40"}])
def test_a_tied_model_before_one_with_a_head_of_its_own(tmp_path, said):
    """Its head is its embeddings, and the output's config no longer says that heads are tied."""
    own = {**gpt2_tensors(1), "lm_head.weight": gpt2_tensors(2)["wte.weight"]}
    models = [
        with_config(gpt2_tensors(0), tmp_path / "tied", said),
        with_config(own, tmp_path / "own", {"tie_word_embeddings": False}),
        with_config(gpt2_tensors(3), tmp_path / "tied_too", said),
    ]
    what = distmerge.soup([distmerge.open(place) for place in models], weights=[0.5, 0.25, 0.25])
    assert_covered(plan(what))
    what.save(tmp_path / "out")
    found, parts = tensors_at(tmp_path / "out"), [gpt2_tensors(n)["wte.weight"] for n in (0, 2, 3)]
    assert set(found) == {*gpt2_tensors(0), "lm_head.weight"}
    mean = parts[0] / 2 + parts[1] / 4 + parts[2] / 4
    torch.testing.assert_close(found["lm_head.weight"], mean)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_a_head_is_not_made_up_for_a_model_that_does_not_tie(tmp_path):
    head = {**gpt2_tensors(1), "lm_head.weight": gpt2_tensors(2)["wte.weight"]}
    models = [
        with_config(tensors, tmp_path / name, {"tie_word_embeddings": False})
        for name, tensors in {"headless": gpt2_tensors(0), "own": head}.items()
    ]
    with pytest.raises(KeyMismatch, match="lm_head"):
        plan(distmerge.soup([distmerge.open(place) for place in models]))


@pytest.mark.parametrize("policy", ["common", "base", "average"])
def test_every_tensor_is_accounted_for_under_each_policy(tmp_path, policy):
    random = torch.Generator().manual_seed(0)
    keys = {"base": "abcd", "law": "abcx", "food": "abdy"}
    models = {
        name: {key: on_grid(torch.randn(5, 3, generator=random)) for key in letters}
        for name, letters in keys.items()
    }
    paths = [save_model(tensors, tmp_path / name) for name, tensors in models.items()]
    opened = [distmerge.open(path) for path in paths]
    what = distmerge.ties(opened, k=0.5, on_missing=policy)
    decided = plan(what)
    assert_covered(decided)
    expected = {"common": "ab", "base": "abcd", "average": "abcdxy"}[policy]
    assert "".join(decided.weight_map) == expected
    what.save(tmp_path / "out")
    merged = tensors_at(tmp_path / "out")
    assert "".join(sorted(merged)) == "".join(sorted(expected))
    if policy == "base":
        assert torch.equal(merged["c"], models["base"]["c"])
    if policy == "average":
        assert torch.equal(merged["y"], models["food"]["y"])


def test_a_part_of_an_expression_accounts_for_the_rest(gpt2s):
    base, law, food = (distmerge.open(path) for path in gpt2s)
    what = (base + 0.5 * (law - base)).subset(["wte.weight", "ln_f.bias"])
    decided = plan(what)
    assert_covered(decided)
    assert set(decided.weight_map) == {"wte.weight", "ln_f.bias"}
    assert_covered(plan(base * 2 - law / 2 + food))


@pytest.mark.parametrize("rows", [512, 513, 1024])
def test_so_many_models_that_one_block_of_them_is_more_than_is_read_at_once(rows, tmp_path):
    random = torch.Generator().manual_seed(rows)
    models = [
        {"w": torch.randn(rows, 512, generator=random), "b": torch.randn(7, generator=random)}
        for _ in range(20)
    ]
    named = [{"model": save_model(m, tmp_path / str(i))} for i, m in enumerate(models)]
    recipe = {"merge_method": "linear", "models": named, "parameters": {"weight": 1.0}}
    distmerge.merge(recipe, str(tmp_path / "out"), allowed_mem="2GiB")
    for key, merged in tensors_at(tmp_path / "out").items():
        mean = torch.stack([m[key].double() for m in models]).mean(0)
        assert torch.allclose(merged.double(), mean, rtol=1e-5, atol=1e-6)
