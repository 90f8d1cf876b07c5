"""What the server saw of sweeps whose candidates are scored: each byte of the inputs once, whatever
reads them again; and what is left of them on this disk."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml
from run.family import names_below, weight_bytes
from servers.ray_machine import machine_with_disk
from servers.ray_nodes import RayNodes
from servers.s3 import LoopbackS3
from servers.traffic import SeenRequest
from small_models import gpt2, save
from sweeps import judging
from sweeps.killing import kill_at_the_third_call
from sweeps.test_read_once import HEADER, times_sent

import distmerge
from distmerge.checkpoints.opening import open_checkpoint
from distmerge.checkpoints.spool import PREFIX
from distmerge.errors import OutputError, RecipeError
from distmerge.run.options import MergeOptions
from distmerge.sweeps import scratch
from distmerge.sweeps.definition import load_sweep
from distmerge.sweeps.plan import SweepPlan, plan_sweep
from distmerge.sweeps.results import Result
from distmerge.sweeps.scratch import Scratch, Spool, is_in_memory

MODELS = ("base", "law", "food")
DENSITIES, WEIGHTS = [0.1, 0.3, 0.5, 0.9], [0.2, 0.5, 1.0, 1.5]
GRID = {"parameters.density": DENSITIES, "models.0.parameters.weight": WEIGHTS}


def test_the_scratch_folder_may_be_a_path():
    assert Scratch(Path("none")) == Scratch("none")
    assert not Scratch(Path("none")).asked


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> list[str]:
    """Models of a megabyte each, so that most of it lies beyond what opening them reads."""
    folder = tmp_path_factory.mktemp("models")
    base = gpt2(0, width=96)
    models = [base, gpt2(1, base, width=96), gpt2(2, base, width=96)]
    return [save(model, folder / name) for model, name in zip(models, MODELS, strict=True)]


@pytest.fixture(scope="module")
def remote(s3: LoopbackS3, local: list[str]) -> list[str]:
    """The same on S3."""
    client = s3.client()
    for name, folder in zip(MODELS, local, strict=True):
        for path in sorted(names_below(folder)):
            body = Path(folder, path).read_bytes()
            client.put_object(Bucket=s3.bucket, Key=f"spooled/{name}/{path}", Body=body)
    return [s3.url(f"spooled/{name}") for name in MODELS]


def recipe(models: list[str]) -> dict[str, object]:
    base, first, second = models
    return {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": first, "parameters": {"weight": 1.0}}, {"model": second}],
        "parameters": {"density": 0.5, "weight": 1.0},
    }


def options(s3: LoopbackS3, allowed: str = "4GiB") -> dict[str, object]:
    return {"workers": 2, "allowed_mem": allowed, "storage_options": s3.storage_options}


def check_read_once(s3: LoopbackS3, local: list[str], seen: list[SeenRequest]) -> None:
    for name, folder in zip(MODELS, local, strict=True):
        body = Path(folder, "model.safetensors").read_bytes()
        times = times_sent(seen, f"/{s3.bucket}/spooled/{name}/model.safetensors", len(body))
        assert len(times) > 6 * HEADER
        assert set(times[HEADER:]) == {1}, name


def left_over(*places: Path) -> list[Path]:
    return [path for place in places for path in place.glob(f"{PREFIX}*")]


@pytest.mark.parametrize(
    ("grid", "function"),
    [
        ({"models.0.parameters.weight": WEIGHTS[:3]}, "whole"),
        pytest.param(GRID, "norm", marks=pytest.mark.full),
        pytest.param(GRID, "total", marks=pytest.mark.full),
    ],
    ids=["three, state dict", "sixteen, state dict", "sixteen, model"],
)
def test_scored_candidates_read_each_byte_once(s3, local, remote, tmp_path, grid, function):
    judged = {"evaluate": f"{judging.__file__}:{function}", "keep": "best 2 by score"}
    out = tmp_path / "out"
    with s3.recording() as seen:
        results = distmerge.sweep(
            {**recipe(remote), "grid": grid, **judged}, str(out), **options(s3)
        )
    check_read_once(s3, local, seen)
    vocabulary = Path(local[0], "tokenizer.json").stat().st_size
    path = f"/{s3.bucket}/spooled/base/tokenizer.json"
    assert set(times_sent(seen, path, vocabulary)) == {1}
    assert len(results) == math.prod(map(len, grid.values()))
    assert all(result.distances.keys() == set(MODELS) for result in results)
    assert left_over(out, tmp_path) == []
    sweep = {**recipe(local), "grid": grid, **judged}
    here = distmerge.sweep(sweep, str(tmp_path / "here"), workers=2, allowed_mem="4GiB")
    assert [r.scores for r in results] == [r.scores for r in here]
    assert [r.distances for r in results] == [r.distances for r in here]
    written = [(a.place, b.place) for a, b in zip(results, here, strict=True) if a.place]
    assert len(written) == 2
    for place, other in written:
        assert weight_bytes(place) == weight_bytes(other)


@pytest.mark.full
def test_the_hub_sends_each_byte_once(hub, local, tmp_path):
    names = [f"spooled/{name}" for name in MODELS]
    for name, folder in zip(names, local, strict=True):
        hub.add_repo(name, folder)
    judged = {"evaluate": f"{judging.__file__}:norm", "keep": "best 2 by score"}
    grid = {"parameters.density": DENSITIES, "parameters.lambda": [0.5, 1.0]}
    sizes = [Path(folder, "model.safetensors").stat().st_size for folder in local]
    with hub.recording() as seen:
        results = distmerge.sweep(
            {**recipe(names), "grid": grid, **judged}, str(tmp_path / "out"), workers=2
        )
    sent = sum(one.sent_bytes for one in seen if one.range is not None)
    assert sum(sizes) <= sent <= sum(sizes) + 2 * HEADER * len(sizes)
    assert left_over(tmp_path / "out", tmp_path) == []
    here = distmerge.sweep(
        {**recipe(local), "grid": grid, **judged}, str(tmp_path / "here"), workers=2
    )
    assert [r.scores for r in results] == [r.scores for r in here]
    assert [bool(r.place) for r in results].count(True) == 2


@pytest.mark.full
def test_killed_and_repeated_it_reads_what_is_missing(s3, local, remote, tmp_path):
    """The third evaluation is stopped before it has read anything; the file below is one that only
    the last candidates need."""
    base, first, second = remote
    keys = {
        **recipe([base, first, first]),
        "models": [{"model": first}],
        "list": [{"seed": n} for n in (1, 2, 3)] + [{"seed": 4, "models": [{"model": second}]}],
        "merge_method": "dare_ties",
        "evaluate": f"{judging.__file__}:slow",
        "keep": "best 2 by score",
        "storage_options": s3.storage_options,
    }
    path, out, there = tmp_path / "sweep.yml", tmp_path / "out", tmp_path / "there"
    path.write_text(yaml.safe_dump(keys))
    command = [sys.executable, "-m", "distmerge.cli", "sweep", path, out, "--scratch", there]
    with s3.recording() as seen:
        environment = kill_at_the_third_call(command, tmp_path)
        (spool,) = left_over(there)
        assert len(list(spool.glob("*.data"))) >= 2
        before = len(seen)
        subprocess.run(command, env=environment, capture_output=True, check=True, timeout=300)
    check_read_once(s3, local, seen)
    again = {request.path for request in seen[before:] if request.range is not None}
    assert f"/{s3.bucket}/spooled/food/model.safetensors" in again
    assert left_over(there, out) == []
    assert len([one for one in out.iterdir() if one.is_dir() and one.name != ".distmerge"]) == 2


def planned(s3, models, where: Scratch, **judging_: object) -> SweepPlan:
    sweep = load_sweep({**recipe(models), "grid": GRID}, judging=judging_)
    return plan_sweep(sweep, MergeOptions(**options(s3)), out="out", scratch=where)


def test_the_plan_says_what_is_kept_and_where(s3, local, remote, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scored = {"evaluate": f"{judging.__file__}:norm"}
    tensors = sum(open_checkpoint(place).nbytes for place in local)
    decided = planned(s3, remote, Scratch(str(tmp_path / "there")), **scored)
    assert isinstance(decided.spool, Spool)
    assert decided.bytes_in == tensors
    assert tensors <= decided.spool.nbytes <= tensors + 100_000, "and the tokenizer's files"
    assert decided.to_json()["spool"]["folder"] == str(tmp_path / "there")
    assert not (tmp_path / "there").exists(), "a plan writes nothing"
    assert planned(s3, remote, Scratch(), **scored).spool.folder == str(tmp_path / "out")
    assert planned(s3, local, Scratch("there"), **scored).spool is None
    assert planned(s3, remote, Scratch("there")).spool is None, "one pass reads nothing again"
    assert "--scratch none" in planned(s3, remote, Scratch("none"), **scored).spool


def test_without_room_it_is_refused_or_said(s3, remote, tmp_path, monkeypatch):
    scored = {"evaluate": f"{judging.__file__}:norm"}
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(scratch, "MARGIN", 1 << 60)
        assert "don't fit into the 0 bytes of" in planned(s3, remote, Scratch(), **scored).spool
    with monkeypatch.context() as other:
        other.setattr(scratch, "is_in_memory", lambda folder: True)
        assert "lies in memory" in planned(s3, remote, Scratch(), **scored).spool
    assert is_in_memory("/dev/shm")
    assert not is_in_memory(str(tmp_path))
    with pytest.raises(OutputError, match=r"of inputs don't fit into the 1 MB of") as raised:
        planned(s3, remote, Scratch(str(tmp_path), "1MB"), **scored)
    with pytest.raises(RecipeError, match="'lots' is not a size"):
        Scratch("none", "lots")
    enough = raised.value.fix.split()[1].rstrip(",")
    assert isinstance(planned(s3, remote, Scratch(str(tmp_path), enough), **scored).spool, Spool)


def judged_on(
    cluster: RayNodes, s3: LoopbackS3, models: list[str], out: Path, there: Path
) -> list[Result]:
    """A sweep of four on a cluster, two candidates at a time, of which the best two are kept."""
    ray.shutdown()  # one that other tests have joined would be used in its place
    return distmerge.sweep(
        {**recipe(models), "grid": {"parameters.density": DENSITIES}},
        str(out),
        evaluate={"function": f"{judging.__file__}:met", "at_once": 2},
        keep="best 2 by loss",
        engine="ray",
        address=cluster.address,
        scratch=str(there),
        **options(s3, "1GiB"),
    )


@pytest.fixture
def meeting(tmp_path, monkeypatch) -> None:
    """Where the evaluator's processes wait for one another."""
    place = tmp_path / "meeting"
    place.mkdir()
    monkeypatch.setenv("MEETING", str(place))


@pytest.mark.full
@pytest.mark.usefixtures("meeting")
def test_workers_of_a_cluster_share_their_nodes_spool(s3, local, remote, tmp_path):
    cluster = RayNodes(2)
    try:
        with s3.recording() as seen:
            results = judged_on(cluster, s3, remote, tmp_path / "out", tmp_path / "there")
    finally:
        cluster.stop()
    check_read_once(s3, local, seen)
    assert len({result.scores["process"] for result in results}) >= 2
    assert len([result for result in results if result.place]) == 2
    assert left_over(tmp_path / "there", tmp_path / "out") == []


@pytest.mark.full
@pytest.mark.usefixtures("meeting")
def test_each_machine_of_a_cluster_has_a_spool_of_its_own(s3, local, remote, tmp_path):
    """The second node sees another disk where the scratch folder is."""
    there, disk = tmp_path / "there", tmp_path / "disk"
    there.mkdir()
    disk.mkdir()
    cluster = RayNodes(1)
    try:
        with s3.recording() as seen, machine_with_disk(cluster.address, there, disk):
            results = judged_on(cluster, s3, remote, tmp_path / "out", there)
            assert left_over(there, disk) == []
    finally:
        cluster.stop()
    assert len({result.scores["process"] for result in results}) >= 2
    for name, folder in zip(MODELS, local, strict=True):
        body = Path(folder, "model.safetensors").read_bytes()
        times = times_sent(seen, f"/{s3.bucket}/spooled/{name}/model.safetensors", len(body))
        assert set(times[HEADER:]) == {2}, name
    assert len([result for result in results if result.place]) == 2
