"""Weights that are no Hugging Face models merge too: one file or several, of any names, without a
config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import distmerge

NAMES = ("base", "law", "food")


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5))


def weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return network().state_dict()


def one_pt(place: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save(tensors, place.with_suffix(".pt"))
    return place.with_suffix(".pt")


def one_safetensors(place: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, place.with_suffix(".safetensors"))
    return place.with_suffix(".safetensors")


def one_of_a_trainer(place: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": tensors, "epoch": 3}, place.with_suffix(".ckpt"))
    return place.with_suffix(".ckpt")


def folder_of_bin(place: Path, tensors: dict[str, Tensor]) -> Path:
    place.mkdir()
    torch.save(tensors, place / "weights.bin")
    return place


def folder_of_parts(place: Path, tensors: dict[str, Tensor]) -> Path:
    place.mkdir()
    keys = list(tensors)
    torch.save({key: tensors[key] for key in keys[:4]}, place / "part-1.pt")
    torch.save({key: tensors[key] for key in keys[4:]}, place / "part-2.pt")
    torch.save({"state": {}, "step": torch.ones(1)}, place / "optimizer.pt")
    return place


FORMS = [one_pt, one_safetensors, one_of_a_trainer, folder_of_bin, folder_of_parts]


def recipe(models: list[Path]) -> dict:
    base, *others = map(str, models)
    return {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": others,
        "parameters": {"weight": 0.5},
    }


def expected() -> dict[str, Tensor]:
    base, law, food = (weights(seed) for seed in range(3))
    return {
        key: base[key] + 0.5 * (law[key] - base[key]) + 0.5 * (food[key] - base[key])
        if base[key].is_floating_point()
        else base[key]
        for key in base
    }


def assert_merged(found: dict[str, Tensor]) -> None:
    assert found.keys() == expected().keys()
    for key, tensor in expected().items():
        assert torch.allclose(found[key], tensor, atol=1e-6), key
    network().load_state_dict(found)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_merges_and_loads_by_torch(form, tmp_path):
    models = [form(tmp_path / name, weights(seed)) for seed, name in enumerate(NAMES)]
    distmerge.merge(recipe(models), str(tmp_path / "out"))
    assert_merged(load_file(tmp_path / "out" / "model.safetensors"))
    assert not (tmp_path / "out" / "config.json").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name" not in card
    assert "base_model_relation: merge" in card
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not left & {"optimizer.pt", "part-1.pt", "weights.bin"}


def test_forms_may_be_mixed_in_one_merge_and_in_arithmetic(tmp_path):
    forms = (one_pt, folder_of_parts, one_safetensors)
    models = [
        form(tmp_path / name, weights(seed))
        for seed, (form, name) in enumerate(zip(forms, NAMES, strict=True))
    ]
    base, law, food = (distmerge.open(str(model)) for model in models)
    assert_merged((base + 0.5 * (law - base) + 0.5 * (food - base)).collect())
