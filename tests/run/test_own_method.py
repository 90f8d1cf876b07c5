"""A researcher's five lines run on state dicts, on modules, from a recipe and on Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run.family import MODELS, SHARD, Family, same_tensors, tensors_at, weight_bytes
from torch import Tensor, nn

import distmerge
from distmerge import StateDict, layer_merge
from distmerge.expressions.lazy import as_lazy

MY = """
import torch

def median3(models, **kw):
    return torch.median(torch.stack(models), 0).values
"""


@pytest.fixture(scope="module")
def my(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mine") / "my.py"
    path.write_text(MY)
    return path


@pytest.fixture(scope="module")
def expected(family: Family) -> dict[str, Tensor]:
    """The middle of three values, by sorting, as the base's dtypes."""
    base, law, food = (tensors_at(family.path(name)) for name in MODELS[:3])
    found = {}
    for key, tensor in base.items():
        if tensor.is_floating_point():
            three = torch.stack([tensor.double(), law[key].double(), food[key].double()])
            found[key] = three.sort(0).values[1].to(tensor.dtype)
        else:
            found[key] = tensor
    return found


def test_it_merges_state_dicts(my, family, expected):
    median3 = distmerge.find_method(f"{my}:median3")
    merged = median3([tensors_at(family.path(name)) for name in MODELS[:3]])
    assert isinstance(merged, distmerge.StateDict)
    assert same_tensors(merged, expected) == []


def test_it_merges_modules(my):
    median3 = distmerge.find_method(f"{my}:median3")
    modules = [nn.Sequential(nn.Linear(63, 5), nn.LayerNorm(5)) for _ in range(3)]
    before = [{k: t.clone() for k, t in m.state_dict().items()} for m in modules]
    merged = median3(modules)
    assert isinstance(merged, nn.Sequential)
    assert merged is not modules[0]
    for key, tensor in merged.state_dict().items():
        three = torch.stack([state[key] for state in before])
        assert torch.equal(tensor, three.sort(0).values[1])
    for module, state in zip(modules, before, strict=True):
        assert same_tensors(module.state_dict(), state) == []


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.full)])
def test_it_merges_from_a_recipe_on_the_command_line_and_on_ray(
    my, family, expected, tmp_path, engine, request
):
    models = [{"model": family.path(name)} for name in MODELS[:3]]
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps({"merge_method": "my.py:median3", "models": models}))
    (tmp_path / "my.py").write_text(my.read_text())
    if engine == "local":
        command = [sys.executable, "-m", "distmerge.cli", "merge", "recipe.yml", "out"]
        subprocess.run([*command, "--max-shard-size", SHARD], cwd=tmp_path, check=True)
    else:
        request.getfixturevalue("cluster")
        made = {"merge_method": f"{my}:median3", "models": models}
        distmerge.merge(made, str(tmp_path / "out"), engine="ray", workers=2, max_shard_size=SHARD)
    assert same_tensors(tensors_at(tmp_path / "out"), expected) == []
    manifest = json.loads((tmp_path / "out/distmerge.json").read_text())
    assert list(manifest["methods"]) == ["median3"]


TRAVELLING = """
import os
from pathlib import Path

import torch
import distmerge

with Path({log!r}).open("a") as log:
    log.write(f"{{os.getpid()}}\\n")
SHARE = 0.25

def sorted_by_value(models):
    return torch.stack(models).sort(0).values

@distmerge.layer_merge
def quarter(models, **kw):
    low, middle, _ = sorted_by_value(models)
    return low + SHARE * (middle - low)
"""
"""A method that needs what lies beside it, in a file that tells which processes run it."""


@pytest.mark.full
@pytest.mark.parametrize("spelling", ["{folder}/travelling.py:quarter", "travelling:quarter"])
def test_it_reaches_workers_that_have_no_such_file(
    cluster, family, tmp_path, monkeypatch, spelling
):
    log = tmp_path / "ran-by"
    (tmp_path / "travelling.py").write_text(TRAVELLING.format(log=str(log)))
    monkeypatch.syspath_prepend(tmp_path)  # of this process; the cluster's are there already
    monkeypatch.delitem(sys.modules, "travelling", raising=False)
    models = [{"model": family.path(name)} for name in MODELS[:3]]
    made = {"merge_method": spelling.format(folder=tmp_path), "models": models}
    for engine in ("local", "ray"):
        out = str(tmp_path / engine)
        distmerge.merge(made, out, engine=engine, workers=2, max_shard_size=SHARD)
    assert weight_bytes(tmp_path / "ray") == weight_bytes(tmp_path / "local")
    assert set(log.read_text().split()) == {str(os.getpid())}


def test_blocks_are_the_same_whoever_asks_for_them(tmp_path: Path) -> None:
    """The caller's thread does some of them, and may be in a mode of its own."""

    @layer_merge(blocks="rows")
    def product(models: list[Tensor]) -> Tensor:
        assert not torch.is_inference_mode_enabled()
        return models[0] @ (torch.eye(63) + 0.1)

    drawn = torch.randn(9000, 63, generator=torch.Generator().manual_seed(0))
    model = StateDict({"w": drawn, "v": drawn[:4500].clone()})
    expected = product([model])
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            eager = product([model])
            out = str(tmp_path / type(mode).__name__)
            made = distmerge.merge(product([as_lazy(model)]), out, workers=2)
            for key in expected:
                assert torch.equal(eager[key], expected[key])
                assert torch.equal(made[key], expected[key])
