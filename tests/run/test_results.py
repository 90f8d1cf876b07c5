"""What a streaming merge computes, against float64 on whole tensors and against eager merges."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run import reference
from run.family import MODELS, SHARD, make_model, same_tensors, tensors_at, weight_bytes
from run.reference import as_arrays, as_tensors

import distmerge
from distmerge.expressions.compute_pool import ComputePool
from distmerge.expressions.lazy import as_lazy
from distmerge.run.results import OpenWindows

WEIGHTS = [1.0, 0.5, 2.0, 0.25]
"""Powers of two: products with the family's values are exact."""


def soup(models: list[Any]) -> Any:
    return distmerge.soup(models, weights=[1.0, *WEIGHTS])


def slerp(models: list[Any]) -> Any:
    return distmerge.slerp(models[:2], tau=0.3)


def stock(models: list[Any]) -> Any:
    return distmerge.stock(models)


def ties(models: list[Any]) -> Any:
    return distmerge.ties(models, k=0.3, weights=WEIGHTS, seed=3)


def ties_over_model(models: list[Any]) -> Any:
    return distmerge.ties(models, k=0.2, weights=WEIGHTS, over="model")


def dare_ties(models: list[Any]) -> Any:
    options = {"weight": WEIGHTS, "density": 0.4, "rescale": True, "seed": 5}
    return distmerge.find_method("dare_ties")(models, **options)


def nested(models: list[Any]) -> Any:
    """Arithmetic around two methods, one of which has the other's result for a model."""
    inner = distmerge.ties(models[:3], k=0.5, weights=[1.0, 1.0], over="model")
    outer = distmerge.stock([models[0], inner, models[4]])
    return models[0] + 0.5 * (outer - models[0]) - inner / 8


def expected(build: Any) -> dict[str, Any]:
    base, *models = (as_arrays(make_model(n)) for n in range(len(MODELS)))
    if build is soup:
        return reference.soup([base, *models], [1.0, *WEIGHTS])
    if build is slerp:
        return reference.slerp(base, models[0], 0.3)
    if build is stock:
        return reference.stock(base, models)
    if build is ties:
        return reference.ties(base, models, 0.3, WEIGHTS, seed=3)
    if build is ties_over_model:
        return reference.ties(base, models, 0.2, WEIGHTS, over="model")
    if build is dare_ties:
        return reference.dare_ties(base, models, 0.4, WEIGHTS, seed=5)
    inner = reference.ties(base, models[:2], 0.5, [1.0, 1.0], over="model", node=1)
    outer = reference.stock(base, [inner, models[3]])
    return {k: base[k] + 0.5 * (outer[k] - base[k]) - inner[k] / 8 for k in base}


BUILDS = [soup, slerp, stock, ties, ties_over_model, dare_ties, nested]


@pytest.fixture(scope="module")
def opened(family):
    return [distmerge.open(family.path(name)) for name in MODELS]


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_the_tensors_are_those_of_a_float64_reference_and_of_an_eager_merge(
    build, opened, tmp_path
):
    dicts = [make_model(number) for number in range(len(MODELS))]
    build(opened).save(tmp_path / "out", out_dtype="float32", max_shard_size=SHARD)
    merged = tensors_at(tmp_path / "out")
    assert len(weight_bytes(tmp_path / "out")) >= 4
    assert set(merged) == set(dicts[0])
    for key, want in as_tensors(expected(build)).items():
        assert merged[key].dtype == torch.float32
        assert torch.allclose(merged[key].double(), want, rtol=2e-6, atol=2e-7), key
    for key in ("lookup", "flags"):
        assert same_tensors({key: merged[key]}, {key: dicts[0][key]}) == []

    if build is nested:  # inner results stay float32 in an expression, not in a state dict
        eager = build([as_lazy(model) for model in dicts]).collect()
    else:
        eager = build(dicts)
    # What was streamed as float32 is what eager arithmetic found before its one rounding.
    assert same_tensors({k: t.to(dicts[0][k].dtype) for k, t in merged.items()}, eager) == []


def test_eager_arithmetic_on_results_agrees_where_nothing_is_rounded(family, tmp_path):
    keys = ["layers.0.proj.weight", "layers.0.scale", "layers.1.none", "lookup"]
    models = [make_model(n, all_float32=True) for n in range(3)]
    dicts = [distmerge.StateDict({k: model[k] for k in keys}) for model in models]
    eagerly = dicts[0] + 0.5 * (distmerge.ties(dicts, k=0.3) - dicts[0]) / 3 - 2 * dicts[1]
    lazies = [distmerge.open(family.path(name)).subset(keys) for name in MODELS[:3]]
    lazily = lazies[0] + 0.5 * (distmerge.ties(lazies, k=0.3) - lazies[0]) / 3 - 2 * lazies[1]
    lazily.save(tmp_path / "out", out_dtype="float32")
    assert same_tensors(dict(eagerly), tensors_at(tmp_path / "out")) == []


def test_one_key_is_computed_as_it_is_among_all(opened):
    whole = ties_over_model(opened).collect()
    assert torch.equal(ties_over_model(opened)["layers.1.long"], whole["layers.1.long"])


def test_the_share_of_deltas_lost_to_rounding_is_counted(opened, tmp_path):
    what = opened[0] + (opened[1] - opened[0]) / 16
    what.save(tmp_path / "single", out_dtype="float32")
    what.save(tmp_path / "rounded", out_dtype="bfloat16", max_shard_size=SHARD)
    single, rounded = tensors_at(tmp_path / "single"), tensors_at(tmp_path / "rounded")
    changed = lost = 0
    for key, base in make_model(0).items():
        if base.is_floating_point():
            moved = single[key] != base.float()
            changed += int(moved.sum())
            lost += int((moved & (rounded[key] == base.bfloat16())).sum())
    manifest = json.loads((tmp_path / "rounded/distmerge.json").read_text())
    assert 0.05 < lost / changed < 0.95
    assert manifest["lost_delta_share"] == pytest.approx(lost / changed, rel=1e-12)
    untouched = json.loads((tmp_path / "single/distmerge.json").read_text())
    assert untouched["lost_delta_share"] is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_arcee_fusion_writes_the_dtype_that_is_asked_for(family, tmp_path, dtype):
    recipe = {
        "merge_method": "arcee_fusion",
        "base_model": family.path(MODELS[0]),
        "models": [{"model": family.path(MODELS[1])}],
        "dtype": dtype,
    }
    distmerge.merge(recipe, str(tmp_path / "out"))
    found = {t.dtype for t in tensors_at(tmp_path / "out").values() if t.is_floating_point()}
    assert found == {getattr(torch, dtype)}


@pytest.mark.timeout(30)
def test_a_block_that_fails_leaves_nobody_waiting_for_a_window() -> None:
    """Others have gone as far ahead as there are windows, and the first one won't be full."""
    free: queue.Queue[torch.Tensor] = queue.Queue()
    for _ in range(3):
        free.put(torch.empty(4))
    writer = SimpleNamespace(buffer=free.get, write=lambda window, nbytes: free.put(window))
    windows = OpenWindows(writer, [2] * 20, [8] * 20)  # type: ignore[arg-type]

    def fill(block: int) -> None:
        try:
            found = windows.open(block // 2)
            if block == 0:
                time.sleep(0.3)
                raise ValueError("the first")
            if found is not None:
                windows.filled(block // 2)
        except BaseException:
            windows.break_off()
            raise

    pool = ComputePool(8)
    with pytest.raises(ValueError, match="the first"):
        pool.map(fill, range(40))
    pool.close()


INTERRUPTED = """
import pathlib, time, torch, distmerge
from distmerge.expressions.lazy import as_lazy

@distmerge.layer_merge(blocks=True)
def slow(models):
    pathlib.Path("started").touch()
    time.sleep(0.02)
    return models[0] * 1.0

models = [distmerge.StateDict({f"w{i}": torch.zeros(512, 512) for i in range(400)})] * 2
distmerge.merge(slow([as_lazy(model) for model in models]), "out", workers=2)
"""


def test_an_interrupted_merge_ends(tmp_path: Path) -> None:
    """The interrupt comes to the main thread; the others wait for windows by then."""
    (tmp_path / "merge.py").write_text(INTERRUPTED)
    command = [sys.executable, "merge.py"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in told
    assert not list(tmp_path.glob("out/*.safetensors"))
