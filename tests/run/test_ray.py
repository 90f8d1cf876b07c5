"""On a real Ray: the local engine's bytes, lost workers, errors, a user's own code."""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
import ray
import torch
from run.family import MODELS, Family, names_below, same_tensors, save_model, tensors_at
from run.merging import SMALL, differing, everything, least_memory, run, small_models

import distmerge
from distmerge.errors import MethodError, RecipeError, WorkerLost
from distmerge.run.events import Event
from distmerge.run.merge import plan
from distmerge.run.ray_actors import QUEUED, Actor, Roster
from distmerge.run.ray_cluster import asked_for, described, fits_somewhere
from distmerge.run.ray_engine import RayEngine, pairing
from distmerge.run.ray_meter import LOOK, STALL, Meter
from distmerge.run.ray_metrics import Metrics
from distmerge.run.ray_worker import Moved
from distmerge.run.worker import WorkerSettings

pytestmark = pytest.mark.usefixtures("cluster")

MY_METHODS = '''
import os
import signal
import time
from pathlib import Path

import torch

def below(models):
    return torch.stack(models)

def median3(models, **kw):
    return torch.median(below(models), 0).values

def fragile(models, *, key: str, driver: int, seen: str, deaths: int, layer_name=""):
    """Kills its process on one key, so many times."""
    if layer_name == key and os.getpid() != driver:
        past = Path(seen)
        count = len(past.read_text()) if past.exists() else 0
        if count < deaths:
            past.write_text("x" * (count + 1))
            os.kill(os.getpid(), signal.SIGKILL)
    return median3(models)

def slow(models, *, seconds: float):
    time.sleep(seconds)
    return median3(models)

def broken(models, *, key: str, driver: int, layer_name=""):
    if layer_name == key and os.getpid() != driver:
        raise ZeroDivisionError("no such luck")
    return models[0]
'''


@pytest.fixture(scope="module")
def my(tmp_path_factory) -> Path:
    """A user's file, that workers can't import."""
    path = tmp_path_factory.mktemp("mine") / "my.py"
    path.write_text(MY_METHODS)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Three small models of four tensors each; a shard for each tensor."""
    folder = tmp_path_factory.mktemp("small")
    return [save_model(m, folder / str(i)) for i, m in enumerate(small_models(3))]


def recipe(my: Path, method: str, models: list[str], **parameters: Any) -> dict[str, Any]:
    named = [{"model": model} for model in models]
    return {"merge_method": f"{my}:{method}", "models": named, "parameters": parameters}


@pytest.mark.parametrize(
    ("workers", "memory"),
    [
        (3, "little"),
        pytest.param(1, "little", marks=pytest.mark.full),
        pytest.param(2, "much", marks=pytest.mark.full),
    ],
)
def test_ray_writes_the_bytes_of_the_local_engine(family: Family, tmp_path, workers, memory):
    what = everything(family)
    local = run(what, tmp_path / "local", workers=1)
    options: dict[str, Any] = {"engine": "ray", "workers": workers}
    options["allowed_mem"] = "4GiB"
    if memory == "little":
        options["allowed_mem"] = least_memory(what, engine="ray", workers=workers)
    events: list[Event] = []
    found = run(what, tmp_path / "ray", listener=events.append, **options)
    assert differing(found, local) == []
    told = {event.kind: event.data for event in events}
    assert told["done"]["peak_memory"] <= told["plan"]["projected_mem"]
    moved = [event.data for event in events if event.kind == "progress"]
    assert sum(data["bytes_read"] for data in moved) >= told["plan"]["bytes_in"]


@pytest.mark.full
def test_relative_paths_and_a_users_method_work_on_other_processes(
    my, models, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    near = [os.path.relpath(model) for model in models]
    made = recipe(my, "median3", near)
    distmerge.merge(made, "streamed", engine="ray", workers=1)
    tensors = [tensors_at(model) for model in models]
    function = distmerge.find_method(f"{my}:median3")
    assert same_tensors(tensors_at(tmp_path / "streamed"), dict(function(tensors))) == []


@pytest.mark.full
def test_a_killed_workers_unit_runs_on_another(my, models, tmp_path):
    events: list[Event] = []
    parameters = {"key": "c", "driver": os.getpid(), "seen": str(tmp_path / "seen")}
    made = recipe(my, "fragile", models, deaths=2, **parameters)
    out = tmp_path / "out"
    # There are three processors: not all of these workers can start, and nobody waits for them.
    distmerge.merge(
        made, str(out), engine="ray", workers=7, max_shard_size=SMALL, listener=events.append
    )
    assert (tmp_path / "seen").read_text() == "xx"
    retried = [event.data for event in events if event.kind == "retry"]
    assert [data["shard"] for data in retried] == ["model-00003-of-00004.safetensors"] * 2
    assert [data["attempt"] for data in retried] == [2, 3]
    whole = distmerge.find_method(f"{my}:median3")([tensors_at(model) for model in models])
    assert same_tensors(tensors_at(out), dict(whole)) == []
    assert not [name for name in names_below(out) if name.endswith(".tmp")]


class Killer:
    """Ends this process's Ray workers, one after the other, at moments drawn at random."""

    def __init__(self, seed: int, within: float, count: int) -> None:
        self.killed = 0
        self._count = count
        self._random = random.Random(seed)
        self._within = within
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._kill)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _kill(self) -> None:
        while self.killed < self._count:
            while not (there := ray_workers()):
                if self._over.wait(0.02):
                    return
            if self._over.wait(self._random.uniform(0, self._within)):
                return
            doomed = self._random.choice(ray_workers() or there)
            with contextlib.suppress(psutil.NoSuchProcess):
                doomed.kill()
                doomed.wait(30)
                self.killed += 1


def ray_workers() -> list[psutil.Process]:
    """The actors' processes of the Ray that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.full
def test_twenty_actors_killed_at_random_moments_change_no_byte(my, tmp_path):
    """In as many runs as that takes: one rightly ends when it loses three workers at one unit, or
    as they start, and the same command goes on from there."""
    numbers = torch.Generator().manual_seed(8)
    tensors = [
        {f"t{n:02}": torch.randn(40, 30, generator=numbers) for n in range(40)} for _ in "ab"
    ]
    models = [save_model(one, tmp_path / str(i)) for i, one in enumerate(tensors)]
    made = recipe(my, "slow", models, seconds=0.4)
    options: dict[str, Any] = {"max_shard_size": SMALL, "out_dtype": None}
    local = run(made, tmp_path / "local", workers=1, **options)
    events: list[Event] = []
    merges, place = 0, tmp_path / "run-0"
    with Killer(seed=0, within=5.0, count=20) as killer:
        while killer.killed < 20 or not merges:
            try:
                found = run(made, place, engine="ray", workers=2, listener=events.append, **options)
            except WorkerLost:
                continue
            assert differing(found, local) == []
            assert not [name for name in names_below(place) if name.endswith(".tmp")]
            merges += 1
            place = tmp_path / f"run-{merges}"
    retried = [event.data for event in events if event.kind == "retry"]
    assert 0 < len(retried) <= killer.killed, "some were killed while a unit ran"


@pytest.mark.full
def test_a_unit_that_kills_every_worker_ends_the_run_and_any_engine_goes_on(my, models, tmp_path):
    parameters = {"key": "b", "driver": os.getpid(), "seen": str(tmp_path / "seen")}
    made = recipe(my, "fragile", models, deaths=3, **parameters)
    out = tmp_path / "out"
    options: dict[str, Any] = {"workers": 1, "max_shard_size": SMALL}
    with pytest.raises(WorkerLost, match=r"model-00002-of-00004\.safetensors lost its worker 3"):
        distmerge.merge(made, str(out), engine="ray", **options)
    assert (tmp_path / "seen").read_text() == "xxx"
    assert "model.safetensors.index.json" not in names_below(out)
    assert not [name for name in names_below(out) if name.endswith(".tmp")]
    events: list[Event] = []
    distmerge.merge(made, str(out), engine="local", listener=events.append, **options)
    (started,) = [event.data for event in events if event.kind == "plan"]
    assert started["resumed"] >= 1
    whole = distmerge.find_method(f"{my}:median3")([tensors_at(model) for model in models])
    assert same_tensors(tensors_at(out), dict(whole)) == []


def test_another_cluster_than_the_one_that_was_joined_is_refused(models, tmp_path):
    named = {"merge_method": "linear", "models": [{"model": m} for m in models]}
    with pytest.raises(RecipeError, match=r"has joined the Ray cluster at .* not the one at"):
        distmerge.merge(
            named | {"parameters": {"weight": 1.0}},
            str(tmp_path / "out"),
            engine="ray",
            address="127.0.0.1:1",
        )
    assert not [name for name in names_below(tmp_path) if name.endswith(".safetensors")]
    assert ray.is_initialized()


def test_what_a_method_raises_arrives_as_it_does_locally(my, models, tmp_path):
    made = recipe(my, "broken", models, key="d", driver=os.getpid())
    with pytest.raises(MethodError) as raised:
        distmerge.merge(made, str(tmp_path / "out"), engine="ray", workers=1)
    assert type(raised.value) is MethodError
    assert str(raised.value).startswith("broken failed on d: ZeroDivisionError: no such luck\n")
    assert "ray" not in str(raised.value).lower().replace("array", "")
    assert [
        n for n in names_below(tmp_path / "out") if "safetensors" in n or n[-4:] == ".tmp"
    ] == []


def test_a_unit_goes_elsewhere_than_where_it_lost_its_worker(models):
    units = plan(distmerge.soup([distmerge.open(model) for model in models]), max_shard_size=SMALL)
    lost, other = units.units[:2]
    here, there = Actor(None, "here", 1), Actor(None, "there", 2)
    losses = {lost.index: ["here"]}
    assert pairing([lost, other], [here], [here, there], losses) == (here, other)
    assert pairing([lost], [here], [here, there], losses) is None
    assert pairing([lost, other], [here, there], [here, there], losses) == (there, lost)
    assert pairing([lost, other], [here], [here], losses) == (here, lost), "nowhere else to go"
    losses = {lost.index: ["here", "there"]}
    assert pairing([lost], [here], [here, there], losses) == (here, lost)


def speaker() -> Any:
    """An actor that says what it is told to say."""

    class Speaker:  # in here, so that it travels by value
        def moved(self) -> tuple[int, int, int]:
            return self.says

        def say(self, says: tuple[int, int, int]) -> None:
            self.says = says

    return ray.remote(Speaker).options(num_cpus=0).remote()


class Watched:
    """A meter with a clock that is set by hand, on one real actor."""

    def __init__(self, unit: Any) -> None:
        self.now = 0.0
        self.events: list[Event] = []
        self.meter = Meter(self.events.append, Metrics(), lambda: self.now)
        self.actor = Actor(speaker(), "here", 7)
        self.meter.begin(self.actor, unit)

    def look(self, says: Moved) -> list[dict[str, Any]]:
        """What a pair of looks tells: one asks, and the next hears."""
        ray.get(self.actor.handle.say.remote(says))
        seen = len(self.events)
        self.now += LOOK
        self.meter.look()
        ray.wait(list(self.meter._asked), num_returns=1)
        self.now += LOOK
        self.meter.look()
        ray.wait(list(self.meter._asked), num_returns=1)
        return [{"event": e.kind, **e.data} for e in self.events[seen:]]


def test_what_a_busy_worker_moves_is_told_once_and_a_stall_too(models):
    units = plan(distmerge.soup([distmerge.open(model) for model in models]), max_shard_size=SMALL)
    before, unit = units.units[:2]
    watched = Watched(unit)
    where = {"shard": unit.shard, "node": "here", "pid": 7}
    assert watched.look((before.index, 50, 50)) == [], "of the unit before"
    first = {"event": "progress", "bytes_read": 10, "bytes_written": 0, **where}
    assert watched.look((unit.index, 10, 0)) == [first]
    assert watched.look((unit.index, 10, 0)) == []
    watched.now += STALL
    (stalled,) = watched.look((unit.index, 10, 0))
    assert stalled.pop("seconds") >= STALL
    assert stalled == {"event": "stall", **where}
    watched.now += STALL
    assert watched.look((unit.index, 10, 0)) == [], "told once"
    moves = {"event": "progress", "bytes_read": 0, "bytes_written": 5, **where}
    assert watched.look((unit.index, 10, 5)) == [moves]
    watched.now += STALL
    assert [told["event"] for told in watched.look((unit.index, 10, 5))] == ["stall"]
    watched.meter.end(watched.actor, (unit.index, 12, 6))
    rest = {"bytes_read": 2, "bytes_written": 1}
    assert watched.events[-1].data == rest | where
    watched.now += 2 * STALL
    asked = len(watched.events)
    watched.meter.look()
    assert len(watched.events) == asked, "nobody is busy"


@pytest.mark.parametrize(("device", "more"), [("cpu", {}), ("cuda", {"GPU": 1.0})])
def test_a_worker_asks_for_its_threads_its_planned_memory_and_a_gpu(models, device, more):
    what = distmerge.soup([distmerge.open(model) for model in models])
    memory = plan(what, engine="ray", max_shard_size=SMALL).memory
    settings = WorkerSettings("out", "d", memory, threads=1, seed=0, device=device)
    asked = asked_for(settings)
    assert asked == {"CPU": 1, "memory": memory.projected, **more}
    assert fits_somewhere(asked) is (device == "cpu"), "there is no GPU on this cluster"
    assert ("1 GPU" in described(asked)) is (device == "cuda")


def test_workers_that_wait_for_room_are_sent_away_when_there_is_no_work_for_them(models):
    what = distmerge.soup([distmerge.open(model) for model in models])
    decided = plan(what, engine="ray", max_shard_size=SMALL)
    settings = WorkerSettings("out", decided.digest, decided.memory, threads=1, seed=0)
    roster = Roster(settings, decided.kernel, lambda event: None)
    roster.asked["CPU"] = 1000.0  # nowhere here
    roster.call_up(1000, [])
    assert len(roster.coming) == QUEUED
    roster.call_up(2, [])
    assert len(roster.coming) == 2
    roster.close()


def test_answers_are_folded_in_the_units_order_whichever_worker_was_first(models, monkeypatch):
    what = distmerge.soup([distmerge.open(model) for model in models])
    units = plan(what, max_shard_size=SMALL).units
    engine = RayEngine.__new__(RayEngine)
    late = [units[place] for place in (2, 0, 3, 1)]
    answers = [(unit, cloudpickle.dumps([unit.shard])) for unit in late]
    monkeypatch.setattr(engine, "_map", lambda *args: iter(answers), raising=False)
    assert list(engine.ask(units, {})) == [[unit.shard] for unit in units]


def test_state_dicts_in_memory_are_refused_before_ray_is_asked(family: Family):
    lazy = distmerge.open(family.path(MODELS[0])) + tensors_at(family.path(MODELS[1]))
    with pytest.raises(distmerge.RecipeError, match="in memory can't be merged on a cluster"):
        plan(lazy, engine="ray")
    assert json.dumps(plan(lazy, engine="local").memory.allowed)
