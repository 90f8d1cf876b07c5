"""The same bytes whatever runs the merge: workers, memory, engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from run.family import MODELS, SHARD, same_tensors, tensors_at
from run.merging import differing, everything, least_memory, run

import distmerge
from distmerge.run.merge import plan
from distmerge.run.windows import raw_bytes


@pytest.fixture(scope="module")
def roomy(family, tmp_path_factory):
    """All files of a merge by one thread with everything resident."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distmerge.plan.needs.REUSED", 1)
        return run(everything(family), tmp_path_factory.mktemp("roomy"), workers=1)


@pytest.mark.usefixtures("fixed_reserve")
@pytest.mark.parametrize(("workers", "memory"), [(1, "little"), (2, "much"), (3, "little")])
def test_all_files_are_the_same_for_any_workers_and_memory(
    family, roomy, tmp_path, workers, memory, monkeypatch
):
    if memory == "much":  # the family has one or two tensors of each size
        monkeypatch.setattr("distmerge.plan.needs.REUSED", 1)
    what = everything(family)
    options: dict[str, Any] = {"workers": workers, "max_shard_size": SHARD}
    allowed = least_memory(what, **options) if memory == "little" else "4GiB"
    decided = plan(what, allowed_mem=allowed, **options)
    largest = max(raw_bytes(task) for unit in decided.units for task in unit.tasks)
    windows = largest / (decided.memory.arena / 2)
    assert windows > 3 if memory == "little" else windows <= 1
    assert differing(run(what, tmp_path, workers=workers, allowed_mem=allowed), roomy) == []
    assert len([name for name in roomy if name.startswith("model-")]) >= 3


@pytest.mark.usefixtures("fixed_reserve")
def test_adjacent_large_tensors_stream_one_after_the_other(family, tmp_path):
    # One shard, so that every large tensor follows another in its unit.
    models = [distmerge.open(family.path(name)) for name in MODELS[:3]]
    keys = ["layers.0.proj.weight", "embed.weight", "head.weight"]
    for what in (distmerge.soup(models), distmerge.ties(models, k=0.2, over="model")):
        part = what.subset(keys)
        allowed = least_memory(part, workers=2)
        settings: dict[str, Any] = {"max_shard_size": "1GB", "workers": 2}
        whole = run(part, tmp_path / f"much-{len(str(what))}", allowed_mem="4GiB", **settings)
        little = run(part, tmp_path / f"little-{len(str(what))}", allowed_mem=allowed, **settings)
        assert differing(little, whole) == []
        assert [name for name in whole if name.endswith(".safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("size", ["400KB", "1GB"])
def test_the_tensors_are_the_same_for_any_shard_size(family, roomy, tmp_path, size):
    files = run(everything(family), tmp_path, max_shard_size=size)
    (tmp_path / "roomy").mkdir()
    for name, data in roomy.items():
        (tmp_path / "roomy" / name).write_bytes(data)
    assert same_tensors(tensors_at(tmp_path / "merged"), tensors_at(tmp_path / "roomy")) == []
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) == {"400KB": 9, "1GB": 1}[size]
    if size == "1GB":
        assert "model.safetensors.index.json" not in files
    else:
        index = json.loads(files["model.safetensors.index.json"])
        assert set(index["weight_map"].values()) == set(shards)
