"""One run at a time for an output, and no dead run in the way of a living one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from run.family import names_below, save_model, weight_bytes
from run.merging import SMALL, small_models
from run.stopping import PROCESSES

import distmerge
from distmerge.errors import OutputExists, OutputLocked
from distmerge.run.events import Event
from distmerge.write import lease as leases
from distmerge.write.lease import EXPIRES, LEASE_FILE, Lease, lease, read_lease
from distmerge.write.local_output import LocalOutput

WAITING = '''
import time
from pathlib import Path

def waiting(models, *, until: str, stolen: str, layer_name=""):
    """Waits for a file; or overwrites another in the middle of the run."""
    while until and not Path(until).exists():
        time.sleep(0.01)
    if stolen and layer_name == "b":
        path, text = stolen.split("=", 1)
        Path(path).write_text(text) if text else Path(path).unlink()
    return models[0] + models[1]
'''


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("small")
    return [save_model(m, folder / str(i)) for i, m in enumerate(small_models(2))]


@pytest.fixture
def recipe(models, tmp_path) -> Path:
    """Of a merge that goes on until the file `go` is there."""
    (tmp_path / "my.py").write_text(WAITING)
    path = tmp_path / "recipe.yml"
    named = [{"model": model} for model in models]
    parameters = {"until": str(tmp_path / "go"), "stolen": ""}
    method = f"{tmp_path}/my.py:waiting"
    path.write_text(json.dumps({"merge_method": method, "models": named, "parameters": parameters}))
    return path


def linear(models: list[str], **parameters: Any) -> dict[str, Any]:
    named = [{"model": model} for model in models]
    return {"merge_method": "linear", "models": named, "parameters": {"weight": 1.0, **parameters}}


def started(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    """A run of the command line that holds the lease and waits."""
    arguments = [sys.executable, "-m", "distmerge.cli", "merge", str(recipe), str(out)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (out / LEASE_FILE).exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_the_second_of_two_runs_is_told_and_a_killed_ones_successor_is_not_kept_waiting(
    recipe, tmp_path
):
    out = tmp_path / "out"
    first = started(recipe, out)
    told = subprocess.run(
        [sys.executable, "-m", "distmerge.cli", "merge", str(recipe), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 2
    assert f"Another run is writing {out}." in told.stderr
    assert f"process {first.pid} on {socket.gethostname()}" in told.stderr
    with pytest.raises(OutputLocked):
        distmerge.merge(str(recipe), str(out), overwrite=True)

    first.send_signal(signal.SIGKILL)
    while psutil.Process(first.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    # Dead, though its parent hasn't asked for its exit code yet, so that its number is in use.
    (tmp_path / "go").touch()
    begin = time.monotonic()
    distmerge.merge(str(recipe), str(out))
    assert time.monotonic() - begin < EXPIRES / 4
    assert (out / "model.safetensors").exists()
    assert first.wait() == -signal.SIGKILL
    assert first.stderr is not None
    first.stderr.close()


def other_lease(*, age: float = 0.0, **fields: Any) -> Lease:
    """Somebody else's, as it would be if it were alive here and last heard of `age` seconds ago."""
    process = psutil.Process(os.getppid())
    mine = {"owner": "other", "host": socket.gethostname(), "process": process.pid}
    times = {"started": process.create_time(), "heartbeat": time.time() - age}
    return Lease(**{**mine, **times, **fields})


def put(output: LocalOutput, found: Lease) -> None:
    text = {name: getattr(found, name) for name in Lease.__dataclass_fields__}
    output.write_bytes(LEASE_FILE, json.dumps(text).encode())


@pytest.mark.parametrize(
    "held",
    [
        {},
        {"host": "elsewhere", "process": 1, "started": 0.0},
        {"host": "elsewhere", "process": 2**22 - 1, "age": EXPIRES - 30},
    ],
    ids=["alive here", "elsewhere, whatever its number", "elsewhere, not heard of for a while"],
)
def test_a_lease_that_may_be_alive_is_respected(models, tmp_path, held):
    output, lease = LocalOutput(tmp_path / "out"), other_lease(**held)
    put(output, lease)
    with pytest.raises(OutputLocked, match="Another run is writing"):
        distmerge.merge(linear(models), str(tmp_path / "out"))
    assert names_below(tmp_path / "out") == {LEASE_FILE}
    assert read_lease(output) == lease


@pytest.mark.parametrize(
    "dead",
    [
        {"age": EXPIRES + 1},
        {"host": "elsewhere", "age": EXPIRES + 1},
        {"process": 2**22 - 1},
        {"started": time.time() - 10**6},
    ],
    ids=["expired here", "expired elsewhere", "no such process", "its number is another's now"],
)
def test_a_dead_runs_lease_is_taken_over(models, tmp_path, dead):
    put(LocalOutput(tmp_path / "out"), other_lease(**dead))
    distmerge.merge(linear(models), str(tmp_path / "out"))
    assert (tmp_path / "out/model.safetensors").exists()
    assert not (tmp_path / "out/.distmerge").exists()


def test_a_lease_cut_short_holds_nobody_up(models, tmp_path):
    (tmp_path / "out/.distmerge").mkdir(parents=True)
    (tmp_path / "out" / LEASE_FILE).write_text('{"owner": "x", "ho')
    distmerge.merge(linear(models), str(tmp_path / "out"))


@pytest.mark.parametrize("how", ["taken over", "taken over and given back"])
def test_a_run_that_lost_its_lease_stops_and_touches_nothing_more(models, recipe, tmp_path, how):
    out = tmp_path / "out"
    text = json.dumps({n: getattr(other_lease(), n) for n in Lease.__dataclass_fields__})
    if how == "taken over and given back":
        text = ""
    made = json.loads(recipe.read_text())
    made["parameters"] = {"until": "", "stolen": f"{out}/{LEASE_FILE}={text}"}
    out.mkdir()
    left = out / "model-00009-of-00009.safetensors.0123456789abcdef.tmp"
    events: list[Event] = []

    def listener(event: Event) -> None:
        events.append(event)
        if event.kind == "progress":
            left.touch()  # what the other run is writing meanwhile

    with pytest.raises(OutputLocked, match=f"process {os.getppid()}" if text else "is gone"):
        distmerge.merge(made, str(out), max_shard_size=SMALL, listener=listener)
    assert "done" not in {event.kind for event in events}
    assert not [n for n in names_below(out) if n.endswith("index.json")]
    assert left.exists()
    found = read_lease(LocalOutput(out))
    assert (found.owner if found else None) == ("other" if text else None)


def test_a_lease_is_renewed_while_it_is_held_and_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(LocalOutput, "heartbeat", 0.01)
    output = LocalOutput(tmp_path)
    with lease(output) as held:
        first = read_lease(output)
        assert first is not None
        deadline = time.monotonic() + 10
        while (now := read_lease(output)) is None or now.heartbeat <= first.heartbeat:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        held.check()
        assert (now.owner, now.process) == (first.owner, os.getpid())
    assert read_lease(output) is None
    assert names_below(tmp_path) == set()


@pytest.mark.parametrize("same", [True, False], ids=["the same merge", "another merge"])
def test_what_another_run_published_in_the_last_moment_is_kept(models, tmp_path, monkeypatch, same):
    out = tmp_path / "out"
    others = linear(models) if same else linear(models[:1])

    def acquire(self: Any) -> None:
        monkeypatch.undo()
        distmerge.merge(others, str(out), max_shard_size=SMALL)
        self.acquire()

    monkeypatch.setattr(leases.LeaseKeeper, "acquire", acquire)
    events: list[Event] = []
    options: dict[str, Any] = {"max_shard_size": SMALL, "listener": events.append}
    if same:
        distmerge.merge(linear(models), str(out), **options)
        assert [event.data["text"] for event in events] == [f"{out} holds this merge already."]
    else:
        with pytest.raises(OutputExists):
            distmerge.merge(linear(models), str(out), **options)
    alone = tmp_path / "alone"
    distmerge.merge(others, str(alone), max_shard_size=SMALL)
    assert weight_bytes(out) == weight_bytes(alone)
    assert not (out / ".distmerge").exists()


def _merge(arguments: tuple[dict[str, Any], str], start: float) -> None:
    time.sleep(max(0.0, start - time.time()))
    try:
        distmerge.merge(*arguments, max_shard_size=SMALL)
    except OutputLocked:
        raise SystemExit(2) from None


def test_of_runs_that_start_at_the_same_moment_one_writes(models, tmp_path):
    alone = tmp_path / "alone"
    distmerge.merge(linear(models), str(alone), max_shard_size=SMALL)
    out = tmp_path / "out"
    start = time.time() + 1.0
    runs = [
        PROCESSES.Process(target=_merge, args=((linear(models), str(out)), start)) for _ in range(3)
    ]
    for process in runs:
        process.start()
    for process in runs:
        process.join()
    codes = sorted(str(process.exitcode) for process in runs)
    assert codes[0] == "0"
    assert set(codes) <= {"0", "2"}  # the slowest may find it done
    assert weight_bytes(out) == weight_bytes(alone)
    assert not (out / ".distmerge").exists()


def test_what_is_published_is_kept_unless_it_is_this_merge_or_overwrite_is_said(models, tmp_path):
    out = tmp_path / "out"
    distmerge.merge(linear(models), str(out))
    before = weight_bytes(out)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(linear(models)))
    again = subprocess.run(
        [sys.executable, "-m", "distmerge.cli", "merge", str(recipe), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (again.returncode, again.stderr) == (0, f"Note: {out} holds this merge already.\n")
    assert weight_bytes(out) == before

    other = linear(models[:1])
    with pytest.raises(OutputExists, match=r"holds a model already\.\nFix: --overwrite"):
        distmerge.merge(other, str(out))
    assert weight_bytes(out) == before
    distmerge.merge(other, str(out), overwrite=True)
    assert weight_bytes(out) != before
    assert json.loads((out / "distmerge.json").read_text())["expression"].startswith("linear(0,")
