"""`dtype:` of a recipe: every method of mergekit's, written in 16 bits, is what it is in 32,
rounded once. How near that is to the formula, tests/methods/test_half_precision.py says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from run.family import save_model, tensors_at

import distmerge
from distmerge.expressions.recipe_words import MERGEKIT_METHODS

WEIGHT = {"weight": 0.6}
HALF = {**WEIGHT, "density": 0.5}
PARAMETERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["linear", "nuslerp", "multislerp", "task_arithmetic"], WEIGHT),
    **dict.fromkeys(["ties", "dare_ties", "dare_linear", "della", "della_linear"], HALF),
    **dict.fromkeys(["breadcrumbs", "breadcrumbs_ties"], HALF),
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.05},
    "sce": {"select_topk": 0.4},
    "passthrough": {"scale": 0.7},
}
COUNTS = {"slerp": 1, "nuslerp": 2, "nearswap": 1, "arcee_fusion": 1, "passthrough": 1}
"""Models beside the base, if not three."""
BASELESS = ("linear", "karcher", "passthrough", "multislerp")
SHAPES = {"model.embed": (40, 16), "model.layers.0.w": (33, 17), "model.layers.1.w": (33, 17)}
SHAPES |= {"model.layers.0.narrow": (9, 1), "model.norm": (16,)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three others in bfloat16."""
    folder, found = tmp_path_factory.mktemp("models"), []
    for number in range(4):
        random = torch.Generator().manual_seed(number)
        drawn = {key: torch.randn(shape, generator=random) for key, shape in SHAPES.items()}
        tensors = {key: tensor.bfloat16() for key, tensor in drawn.items()}
        found.append(save_model(tensors, folder / f"m{number}"))
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", sorted(MERGEKIT_METHODS))
def test_every_method_is_rounded_once_to_the_dtype_asked_for(method, dtype, models, tmp_path):
    base, *others = models
    recipe = {
        "merge_method": method,
        "models": others[: COUNTS.get(method, 3)],
        "parameters": PARAMETERS.get(method, {}),
        **({} if method in BASELESS else {"base_model": base}),
    }
    for name in ("float32", dtype):
        distmerge.merge({**recipe, "dtype": name}, str(tmp_path / name))
    wide, found = tensors_at(tmp_path / "float32"), tensors_at(tmp_path / dtype)
    assert found.keys() == SHAPES.keys()
    for key, tensor in found.items():
        assert wide[key].dtype == torch.float32
        assert tensor.dtype == getattr(torch, dtype)
        assert tensor.isfinite().all()
        assert torch.equal(tensor, wide[key].to(tensor.dtype)), key
