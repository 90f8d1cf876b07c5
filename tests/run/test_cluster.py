"""On a cluster of three raylets: what is lost runs elsewhere, and the bytes are the same."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from run.family import Family, names_below, on_grid, same_tensors, save_model, tensors_at
from run.merging import SMALL, comparable, differing, run
from servers.ray_nodes import RayNodes

from distmerge.run.ray_meter import LOOK

pytestmark = pytest.mark.full

UNITS = 60
SLOW = '''
import os
import time
import torch

def slow(models, *, seconds: float, after: str = "/"):
    """The median, after a while, when a file is there."""
    while not os.path.exists(after):
        time.sleep(0.05)
    time.sleep(seconds * float(os.environ.get("SLOWER", 1)))
    return torch.median(torch.stack(models), 0).values
'''
Told = dict[str, Any]


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    cluster = RayNodes(3)
    yield cluster
    cluster.stop()


class Driver:
    """A `distmerge merge` of its own process, and what it has told."""

    def __init__(
        self, nodes: RayNodes, recipe: Path, out: Path, *options: str, **environment: str
    ) -> None:
        command = ["merge", str(recipe), str(out), "--engine", "ray", "--address", nodes.address]
        self.events: list[Told] = []
        self.strays: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distmerge.cli", *command, "--json", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.startswith("{"):
                self.strays.append(line)  # a reader that dies would wait for ever
                continue
            with self._changed:
                self.events.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def of(self, kind: str) -> list[Told]:
        return [event for event in self.events if event["event"] == kind]

    def has(self, kind: str, **data: Any) -> bool:
        return any(data.items() <= event.items() for event in self.of(kind))

    def until(self, seen: Callable[[], bool]) -> bool:
        """Wait until something was told; False if the driver ended without."""
        with self._changed:
            self._changed.wait_for(lambda: seen() or self._ended, timeout=120)
            return seen()

    def end(self) -> str:
        """Wait for the end, which is to be a good one; what it said to people."""
        said = self.failed()
        assert self.process.returncode == 0, said
        assert self.strays == [], "only events are on standard output"
        return said

    def failed(self) -> str:
        assert self.process.stderr is not None
        said = self.process.stderr.read()
        self.process.wait()
        self._reader.join()
        return said

    def kill(self) -> None:
        self.process.kill()
        self.failed()


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[str]:
    """Three models of sixty tensors; a shard for each tensor."""
    folder = tmp_path_factory.mktemp("many")
    random = torch.Generator().manual_seed(5)
    models = [
        {f"t{n:02}": on_grid(torch.randn(63, 11, generator=random)) for n in range(UNITS)}
        for _ in range(3)
    ]
    return [save_model(model, folder / str(i)) for i, model in enumerate(models)]


@pytest.fixture(scope="module")
def slowly(many, tmp_path_factory) -> Path:
    """A recipe whose units take a quarter of a second each."""
    folder = tmp_path_factory.mktemp("slowly")
    (folder / "my.py").write_text(SLOW)
    recipe = {
        "merge_method": f"{folder / 'my.py'}:slow",
        "models": [{"model": model} for model in many],
        "parameters": {"seconds": 0.25},
    }
    path = folder / "recipe.yml"
    path.write_text(json.dumps(recipe))
    return path


def held(slowly: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The recipe with units that don't end before a file is there; that file."""
    recipe = json.loads(slowly.read_text())
    recipe["parameters"]["after"] = str(tmp_path / "go")
    (tmp_path / "held.yml").write_text(json.dumps(recipe))
    return tmp_path / "held.yml", tmp_path / "go"


def assert_merged(out: Path, models: list[str]) -> None:
    """The medians are there, whole, and nothing else is left."""
    inputs = [tensors_at(model) for model in models]
    medians = {key: torch.stack([m[key] for m in inputs]).median(0).values for key in inputs[0]}
    assert same_tensors(tensors_at(out), medians) == []
    assert not [name for name in names_below(out) if ".tmp" in name or ".distmerge" in name]


def small(workers: int = 3) -> list[str]:
    return ["--workers", str(workers), "--max-shard-size", str(SMALL)]


def test_three_nodes_write_the_bytes_of_one_process(nodes, family: Family, tmp_path):
    recipe = tmp_path / "recipe.yml"
    parameters = {"density": 0.3, "weight": 1.0}
    recipe.write_text(
        family.recipe(
            "ties", base_model=family.path("base"), parameters=parameters, over="model", seed=4
        )
    )
    shard = "400KB"
    local = run(str(recipe), tmp_path, workers=1, max_shard_size=shard, out_dtype=None)
    options = ["--workers", "3", "--max-shard-size", shard]
    place = tmp_path / "ray"
    driver = Driver(nodes, recipe, place / "merged", *options)
    driver.end()
    assert differing(comparable(place / "merged"), local) == []


def test_a_raylet_that_dies_in_mid_merge_costs_a_retry_elsewhere(nodes, slowly, many, tmp_path):
    doomed = nodes.add()
    recipe, go = held(slowly, tmp_path)
    driver = Driver(nodes, recipe, tmp_path / "out", *small(4))
    on_it = f"/{doomed.id[:6]}"
    assert driver.until(lambda: len(driver.of("worker")) == 4)
    assert len({event["node"] for event in driver.of("worker")}) == 4, "spread over the nodes"
    seen = len(driver.of("worker"))
    on_node = [e["pid"] for e in driver.of("worker") if e["node"].endswith(on_it)]
    for pid in (doomed.pid, *on_node):  # as when the machine goes: all at once
        os.kill(pid, signal.SIGKILL)
    go.touch()
    driver.end()
    lost = driver.of("retry")
    assert len(lost) == 1
    assert lost[0]["node"].endswith(on_it)
    assert lost[0]["shard"] in [event["shard"] for event in driver.of("unit")]
    assert not [event for event in driver.of("worker")[seen:] if event["node"].endswith(on_it)]
    assert_merged(tmp_path / "out", many)


def test_a_raylet_that_dies_alone_takes_its_worker_along(nodes, slowly, many, tmp_path):
    doomed = nodes.add()
    recipe, go = held(slowly, tmp_path)
    driver = Driver(nodes, recipe, tmp_path / "out", *small(4))
    on_it = f"/{doomed.id[:6]}"
    assert driver.until(lambda: len(driver.of("worker")) == 4)
    os.kill(doomed.pid, signal.SIGKILL)
    # Its process may end units and begin others until Ray finds the node dead, half a minute on:
    # one that waits for the file doesn't, and so is lost for sure.
    assert driver.until(lambda: driver.has("retry"))
    go.touch()
    driver.end()
    assert [event["node"][-7:] for event in driver.of("retry")] == [on_it]
    assert_merged(tmp_path / "out", many)


def test_a_node_that_joins_in_mid_merge_gets_work(slowly, many, tmp_path):
    growing = RayNodes(1)
    try:
        recipe, go = held(slowly, tmp_path)
        driver = Driver(growing, recipe, tmp_path / "out", "--max-shard-size", str(SMALL))
        assert driver.until(lambda: len(driver.of("worker")) == 1)
        joined = growing.add()
        # Nobody has finished a unit: all units are there for the worker that comes.
        assert driver.until(lambda: len(driver.of("worker")) == 2), "its worker was queued before"
        assert not driver.of("unit")
        go.touch()
        driver.end()
    finally:
        growing.stop()
    assert driver.of("worker")[1]["node"].endswith(f"/{joined.id[:6]}")
    nodes_of = {event["node"][-6:] for event in driver.of("unit")}
    assert nodes_of == {event["node"][-6:] for event in driver.of("worker")}
    assert_merged(tmp_path / "out", many)


def test_a_slow_node_gets_less(slowly, many, tmp_path):
    uneven = RayNodes(1)
    try:
        slow = uneven.add(SLOWER="8")
        recipe, go = held(slowly, tmp_path)
        driver = Driver(uneven, recipe, tmp_path / "out", *small(2))
        assert driver.until(lambda: len(driver.of("worker")) == 2)
        go.touch()
        driver.end()
    finally:
        uneven.stop()
    on_it = [e for e in driver.of("unit") if e["node"].endswith(f"/{slow.id[:6]}")]
    assert 0 < len(on_it) < UNITS / 4, "each pulls the next unit when it has done one"
    assert_merged(tmp_path / "out", many)


def test_of_two_drivers_at_one_output_one_wins_and_the_other_is_told(nodes, slowly, many, tmp_path):
    recipe, go = held(slowly, tmp_path)
    first = Driver(nodes, recipe, tmp_path / "out", *small(1))
    assert first.until(lambda: len(first.of("worker")) == 1)
    second = Driver(nodes, recipe, tmp_path / "out", *small(1))
    said = second.failed()
    assert second.process.returncode == 2, said
    assert "Another run is writing" in said
    assert not second.of("worker")
    go.touch()
    first.end()
    assert_merged(tmp_path / "out", many)


def test_bytes_are_told_while_a_unit_runs(nodes, slowly, many, tmp_path):
    recipe, go = held(slowly, tmp_path)
    driver = Driver(nodes, recipe, tmp_path / "out", "--workers", "1")
    assert driver.until(lambda: any(e["bytes_read"] > 0 for e in driver.of("progress")))
    assert not driver.of("unit")
    go.touch()
    driver.end()
    (told,) = driver.of("plan")
    moved = driver.of("progress")
    assert sum(event["bytes_read"] for event in moved) == told["bytes_in"]
    assert sum(event["bytes_written"] for event in moved) == told["bytes_out"]
    (worker,) = driver.of("worker")
    assert {(event["node"], event["pid"]) for event in moved} == {(worker["node"], worker["pid"])}
    seconds = driver.events[-1]["time"] - worker["time"]
    assert len(moved) <= seconds / LOOK + 2


def test_after_the_drivers_death_only_missing_shards_are_written(nodes, slowly, many, tmp_path):
    out = tmp_path / "out"
    first = Driver(nodes, slowly, out, *small())
    assert first.until(lambda: len(first.of("unit")) >= 5)
    workers = [event["pid"] for event in first.of("worker")]
    first.kill()
    for pid in workers:  # they end with their driver, but not at once
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(60)
    finished = {p.name.removesuffix(".json") for p in out.glob(".distmerge/*/model-*.json")}
    assert 5 <= len(finished) < UNITS
    before = {name: (out / name).stat() for name in finished}
    second = Driver(nodes, slowly, out, *small())
    second.end()
    assert second.of("plan")[0]["resumed"] == len(finished)
    written = [event["shard"] for event in second.of("unit")]
    assert len(written) == UNITS - len(finished)
    assert not finished & set(written)
    after = {name: (out / name).stat() for name in finished}
    assert {n: (s.st_ino, s.st_mtime_ns) for n, s in after.items()} == {
        n: (s.st_ino, s.st_mtime_ns) for n, s in before.items()
    }
    assert_merged(out, many)


def test_a_worker_with_another_distmerge_is_refused_in_a_sentence(slowly, tmp_path):
    other = tmp_path / "other" / "distmerge-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: distmerge\nVersion: 9.9.9\n")
    path = os.pathsep.join(filter(None, [str(other.parent), os.environ.get("PYTHONPATH")]))
    elsewhere = RayNodes(0)
    try:
        elsewhere.add(PYTHONPATH=path)
        driver = Driver(elsewhere, slowly, tmp_path / "out", *small(1))
        said = driver.failed()
    finally:
        elsewhere.stop()
    assert driver.process.returncode == 2, said
    assert re.search(
        r"""^A worker has other versions than this machine\.
  distmerge \S+ here, 9\.9\.9 on \S+
Fix: install the same distmerge, torch and Python on every node$""",
        said,
        re.MULTILINE,
    ), said
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_workers_that_ray_kills_for_want_of_memory_end_the_run_with_the_numbers(slowly, tmp_path):
    # A node whose memory counts as full from its first byte: Ray kills what runs there.
    full = RayNodes(
        1, {"RAY_memory_usage_threshold": "0.0", "RAY_memory_monitor_refresh_ms": "100"}
    )
    try:
        never_ends, _ = held(slowly, tmp_path)
        driver = Driver(full, never_ends, tmp_path / "out", *small(1))
        said = driver.failed()
    finally:
        full.stop()
    assert driver.process.returncode == 2, said
    # Whether they are killed before they have a unit or with it is a matter of moments.
    assert re.search(r"(3 workers in a row died as they started|lost its worker 3 times)\.\n", said)
    reasons = [event["reason"] for event in driver.of("retry")]
    assert len(reasons) >= 2
    assert all("running low on memory" in reason for reason in reasons), reasons
    assert re.search(r"a worker may use 2\.0 GiB, planned \d\.\d GiB", said), said
    assert "Fix: look at Ray's logs of that node; a smaller --allowed-mem" in said
    assert not list((tmp_path / "out").glob("*.index.json"))


def test_a_cluster_that_asks_for_a_token_lets_in_who_has_it(many, tmp_path):
    token = f"planted-{secrets.token_hex(24)}"
    mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    recipe = tmp_path / "recipe.yml"
    models = [{"model": model} for model in many]
    recipe.write_text(json.dumps({"merge_method": "median", "models": models}))
    sessions = Path(f"/tmp/{token[-6:]}")  # Ray's sockets are in there, and their names are short
    sessions.mkdir()
    guarded = RayNodes(1, {**mode, "RAY_TMPDIR": str(sessions)})
    try:
        driver = Driver(guarded, recipe, tmp_path / "out", *small(1), **mode)
        said = driver.end()
        wrong = {**mode, "RAY_AUTH_TOKEN": token[::-1]}
        refused = Driver(guarded, recipe, tmp_path / "refused", *small(1), **wrong)
        sentence = refused.failed()
    finally:
        guarded.stop()
    found: dict[Path, bytes] = {}
    for path in (*sessions.rglob("*"), *tmp_path.rglob("*")):
        with contextlib.suppress(OSError):  # sockets, folders, and what ends with the cluster
            found[path] = path.read_bytes()
    shown = [str(path) for path, data in found.items() if token.encode() in data]
    logs = [path for path in found if path.suffix == ".log"]
    shutil.rmtree(sessions)
    assert shown == []
    assert logs
    assert token not in said + json.dumps(driver.events) + sentence
    assert refused.process.returncode == 2, sentence
    assert "Could not join the Ray cluster" in sentence
    assert "Fix: check --address, and RAY_AUTH_MODE and its token" in sentence
    assert_merged(tmp_path / "out", many)
