"""A vocabulary of their own for models that are made as they are read: with an adapter, in 8 bits,
with renamed keys, in slices, on Ray. Each against the same merge of models that were changed by
hand before, in plain torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run.family import same_tensors, tensors_at
from safetensors.torch import save_file
from torch import Tensor
from vocabulary.models import TEXTS, save, tokenizer

import distmerge

Change = Callable[[str, Path], tuple[Any, dict[str, Tensor]]]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "prose": save(folder / "prose", tokenizer(TEXTS["prose"], 290), 1),
        "law": save(folder / "law", tokenizer(TEXTS["law"], 300, ["<|turn|>"]), 2),
    }


def recipe(prose: str, law: Any, **fields: Any) -> str:
    model = law if isinstance(law, dict) else {"model": law}
    listed = [
        {"model": prose, "parameters": {"weight": 0.7}},
        {**model, "parameters": {"weight": 0.3}},
    ]
    head = {"merge_method": "linear", "base_model": prose, "tokenizer": {"source": "union"}}
    return json.dumps({**head, "models": listed, "dtype": "float32", **fields})


def copied(place: str, folder: Path, tensors: dict[str, Tensor]) -> str:
    """A model's other files with these tensors."""
    shutil.copytree(place, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def with_adapter(place: str, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Embeddings, head and a layer adapted."""
    tensors = tensors_at(place)
    random = torch.Generator().manual_seed(7)
    parts, meant = {}, dict(tensors)
    for key in (EMBED, HEAD, UP):
        rows, columns = tensors[key].shape
        a = torch.randn(3, columns, generator=random)
        b = torch.randn(rows, 3, generator=random)
        name = f"base_model.model.{key.removesuffix('.weight')}"
        if key == EMBED:  # stored the other way round, as peft does
            parts |= {f"{name}.lora_embedding_A": b.T.contiguous()}
            parts |= {f"{name}.lora_embedding_B": a.T.contiguous()}
        else:
            parts |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        meant[key] = tensors[key] + 2 * b @ a
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(parts, adapter / "adapter_model.safetensors")
    wanted = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    (adapter / "adapter_config.json").write_text(json.dumps(wanted))
    return f"{place}+{adapter}", meant


def in_eight_bits(place: str, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Head and a layer in FP8, a scale for each tensor."""
    tensors = tensors_at(place)
    meant = dict(tensors)
    for key in (HEAD, UP):
        scale = tensors[key].abs().max() / 448
        tensors[key] = (meant[key] / scale).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale"] = scale
        meant[key] = tensors[key].float() * scale
    made = copied(place, folder / "coded", tensors)
    config = json.loads(Path(made, "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    Path(made, "config.json").write_text(json.dumps(config))
    return made, meant


def renamed(place: str, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Under another prefix."""
    tensors = tensors_at(place)
    other = {f"wrapped.{key}": tensor for key, tensor in tensors.items()}
    return {"model": copied(place, folder / "other", other), "rename": {"wrapped.": ""}}, tensors


@pytest.mark.parametrize("change", [with_adapter, in_eight_bits, renamed])
def test_as_if_the_model_had_been_changed_before(places, tmp_path, change: Change):
    given, meant = change(places["law"], tmp_path)
    plain = copied(places["law"], tmp_path / "plain", meant)
    found, expected = tmp_path / "found", tmp_path / "expected"
    distmerge.merge(recipe(places["prose"], given), str(found))
    distmerge.merge(recipe(places["prose"], plain), str(expected))
    written, wanted = tensors_at(found), tensors_at(expected)
    assert written.keys() == wanted.keys()
    assert len(written[EMBED]) > len(tensors_at(places["law"])[EMBED])
    for key, tensor in wanted.items():
        torch.testing.assert_close(written[key], tensor, msg=key)
    assert not torch.equal(written[UP], tensors_at(places["prose"])[UP])


def test_in_slices_as_in_models(places, tmp_path):
    prose, law = places["prose"], places["law"]
    distmerge.merge(recipe(prose, law), str(tmp_path / "models"))
    sources = [
        {"model": place, "layer_range": [0, 1], "parameters": {"weight": weight}}
        for place, weight in ((prose, 0.7), (law, 0.3))
    ]
    sliced = {**json.loads(recipe(prose, law)), "slices": [{"sources": sources}]}
    del sliced["models"]
    distmerge.merge(json.dumps(sliced), str(tmp_path / "slices"))
    found = tensors_at(tmp_path / "slices")
    assert same_tensors(found, tensors_at(tmp_path / "models")) == []


@pytest.mark.full
@pytest.mark.parametrize("change", [with_adapter, renamed])
def test_on_ray_the_bytes_are_those_of_one_process(places, tmp_path, change: Change):
    given, _ = change(places["law"], tmp_path)
    asked = {"source": "union", "pad_to_multiple_of": 64}
    text = recipe(places["prose"], given, tokenizer=asked)
    here, there = tmp_path / "here", tmp_path / "there"
    distmerge.merge(text, str(here))
    distmerge.merge(text, str(there), engine="ray", workers=2, max_shard_size="6KB")
    assert same_tensors(tensors_at(here), tensors_at(there)) == []
