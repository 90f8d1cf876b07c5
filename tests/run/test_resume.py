"""Runs that are killed, and the same command again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from run.family import MODELS, SHARD, Family, names_below, weight_bytes
from run.stopping import command as merge_command
from run.stopping import run_until

import distmerge
from distmerge.run.events import Event

INDEX = "model.safetensors.index.json"
RECEIPT = r"\.distmerge/[0-9a-f]{32}/model.*\.json$"


@dataclass(frozen=True)
class Command:
    """One `distmerge merge`, on the command line or in this process."""

    recipe: Path
    out: Path
    shard: str = SHARD

    @property
    def arguments(self) -> list[str]:
        options = ["--workers", "2", "--max-shard-size", self.shard]
        return ["merge", str(self.recipe), str(self.out), *options]

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "distmerge.cli", *self.arguments], stderr=subprocess.DEVNULL
        )

    def stopped(self, call: str, path: str, nth: int = 1, *more: str) -> None:
        """Run it until it kills itself there."""
        marker = self.out.with_suffix(".marker")
        code = run_until(call, path, nth, marker, merge_command, *self.arguments, *more)
        assert code == -signal.SIGKILL
        assert marker.exists(), "the window was not hit"
        marker.unlink()

    def again(self, **options: Any) -> list[Event]:
        """Run it to its end, here."""
        events: list[Event] = []
        settings: dict[str, Any] = {"workers": 2, "max_shard_size": self.shard, **options}
        distmerge.merge(str(self.recipe), str(self.out), listener=events.append, **settings)
        return events


@pytest.fixture(scope="module")
def recipe(family: Family, tmp_path_factory) -> Path:
    """Random choices, and questions about the whole model."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yml"
    parameters = {"density": 0.3, "weight": 1.0}
    text = family.recipe(
        "ties", base_model=family.path("base"), parameters=parameters, over="model", seed=4
    )
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory) -> dict[str, bytes]:
    command = Command(recipe, tmp_path_factory.mktemp("undisturbed") / "out")
    command.again()
    return weight_bytes(command.out)


@pytest.fixture
def command(recipe, tmp_path) -> Command:
    return Command(recipe, tmp_path / "out")


def identity(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of last change of every shard that is there."""
    found = {path.name: path.stat() for path in folder.glob("model-*.safetensors")}
    return {name: (info.st_ino, info.st_mtime_ns) for name, info in found.items()}


def receipts(folder: Path) -> set[str]:
    """The shards that have one."""
    return {path.name.removesuffix(".json") for path in folder.glob(".distmerge/*/model*.json")}


def assert_invisible(folder: Path) -> None:
    """Nothing there would be loaded."""
    assert not (folder / INDEX).exists()
    assert not (folder / "model.safetensors").exists()


def assert_clean(folder: Path) -> None:
    """Nothing of a run is left."""
    assert not [n for n in names_below(folder) if n.endswith(".tmp") or ".distmerge/" in n]
    assert not (folder / ".distmerge").exists()


@pytest.mark.parametrize(
    ("call", "path", "nth", "shards", "vouched"),
    [
        ("PendingLocalFile.write", r"model-0.*safetensors$", 5, 1, 1),
        ("PendingLocalFile.commit", r"model-0.*safetensors$", 2, 1, 1),
        ("LocalOutput.write_bytes", RECEIPT, 2, 2, 1),
        ("LocalOutput.write_bytes", r"answers\.json$", 1, 0, 0),
        ("LocalOutput.write_bytes", r"distmerge\.json$", 1, 5, 5),
        ("LocalOutput.write_bytes", r"index\.json$", 1, 5, 5),
    ],
    ids=[
        "in the middle of a shard",
        "shard written, not named",
        "shard done, no receipt",
        "answers found, not journalled",
        "all done, no manifest",
        "all done, no index",
    ],
)
def test_a_killed_run_goes_on(command, undisturbed, call, path, nth, shards, vouched):
    command.stopped(call, path, nth)
    assert_invisible(command.out)
    before = identity(command.out)
    finished = receipts(command.out)
    assert (len(before), len(finished)) == (shards, vouched)
    events = command.again()
    kept = {name for name, seen in identity(command.out).items() if before.get(name) == seen}
    assert kept == finished
    told = {event.kind: event.data for event in events}
    assert told["plan"]["resumed"] == len(finished)
    assert [e.kind for e in events].count("unit") == len(undisturbed) - 1 - len(finished)
    assert weight_bytes(command.out) == undisturbed
    assert_clean(command.out)


def test_a_receipt_without_its_shard_vouches_for_nothing(command, undisturbed):
    command.stopped("LocalOutput.write_bytes", r"index\.json$")
    shards = sorted(command.out.glob("model-*.safetensors"))
    shards[0].unlink()
    os.truncate(shards[1], shards[1].stat().st_size - 1)
    (receipt,) = command.out.glob(f".distmerge/*/{shards[2].name}.json")
    receipt.write_bytes(receipt.read_bytes()[:-5])
    before = identity(command.out)
    command.again()
    kept = {name for name, seen in identity(command.out).items() if before.get(name) == seen}
    assert kept == {shard.name for shard in shards[3:]}
    assert weight_bytes(command.out) == undisturbed
    assert_clean(command.out)


def test_a_run_killed_after_its_index_is_done(command, undisturbed):
    command.stopped("LocalOutput.delete", RECEIPT)
    assert weight_bytes(command.out) == undisturbed
    before = identity(command.out)
    events = command.again()
    assert identity(command.out) == before
    assert [event.data["text"] for event in events] == [f"{command.out} holds this merge already."]
    assert_clean(command.out)


def test_a_lone_shard_gets_its_name_last(recipe, tmp_path):
    command = Command(recipe, tmp_path / "out", shard="1GB")
    command.stopped("LocalOutput.move", r"model\.safetensors$")
    assert_invisible(command.out)
    assert {"config.json", "distmerge.json", "vocab.txt"} < names_below(command.out)
    (staged,) = command.out.glob(".distmerge/*/model.safetensors")
    inode = staged.stat().st_ino
    command.again()
    assert (command.out / "model.safetensors").stat().st_ino == inode
    assert_clean(command.out)


def test_kills_at_any_moment(command, undisturbed):
    # The same command, over and over; each time it is killed a moment after it began to write.
    moments = random.Random(7)
    kills = 0
    for _ in range(12):
        process = command.start()
        deadline = time.monotonic() + 60
        while process.poll() is None and not (command.out / ".distmerge/lease.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.4))
        process.kill()
        if process.wait() != -signal.SIGKILL:
            break
        kills += 1
        if not (command.out / INDEX).exists():
            assert_invisible(command.out)
            before, finished = identity(command.out), receipts(command.out)
        if kills == 3:
            break
    assert kills >= 2
    if not (command.out / INDEX).exists():
        command.again()
        now = identity(command.out)
        assert all(now[name] == before[name] for name in finished)
    else:
        command.again()
    assert weight_bytes(command.out) == undisturbed
    assert_clean(command.out)


def test_an_interrupted_command_says_so_and_goes_on(command, undisturbed):
    process = subprocess.Popen(
        [sys.executable, "-m", "distmerge.cli", *command.arguments], stderr=subprocess.PIPE
    )
    while process.poll() is None and not (command.out / ".distmerge/lease.json").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert b"The same command goes on" in said
    assert_invisible(command.out)
    assert not [name for name in names_below(command.out) if name.endswith(".tmp")]
    command.again()
    assert weight_bytes(command.out) == undisturbed


def test_another_merge_between_two_runs_takes_the_shards_of_the_first(
    command, undisturbed, family, tmp_path
):
    # Same names, same sizes, other bytes: only receipts written after them may vouch for shards.
    command.stopped("LocalOutput.write_bytes", r"index\.json$")
    other = tmp_path / "other.yml"
    other.write_text(family.recipe("linear", MODELS, parameters={"weight": 1.0}))
    Command(other, command.out).stopped("LocalOutput.write_bytes", r"index\.json$")
    assert identity(command.out).keys() == {name for name in undisturbed if name != INDEX}
    command.again()
    assert weight_bytes(command.out) == undisturbed
    assert_clean(command.out)


def test_shards_of_another_layout_are_cleared_away(command, undisturbed):
    Command(command.recipe, command.out, shard="400KB").stopped(
        "LocalOutput.write_bytes", r"index\.json$"
    )
    assert len(identity(command.out)) > len(undisturbed) - 1
    command.again()
    assert weight_bytes(command.out) == undisturbed


@pytest.mark.parametrize(
    ("call", "path", "nth"),
    [
        ("LocalOutput.delete", r"^config\.json", 1),
        ("LocalOutput.delete", r"^distmerge\.json", 1),
        ("LocalOutput.delete", r"^model-00002-of-00009", 1),
        ("LocalOutput.write_bytes", RECEIPT, 2),
    ],
    ids=["files left", "manifest left", "old shards half gone", "new shards half there"],
)
def test_an_overwrite_that_is_killed_leaves_no_index_over_mixed_shards(
    command, undisturbed, family, tmp_path, call, path, nth
):
    other = tmp_path / "other.yml"
    other.write_text(family.recipe("linear", MODELS, parameters={"weight": 1.0}))
    Command(other, command.out, shard="400KB").again()
    assert len(identity(command.out)) == 9
    command.stopped(call, path, nth, "--overwrite")
    assert_invisible(command.out)
    command.again(overwrite=True)
    assert weight_bytes(command.out) == undisturbed
    assert_clean(command.out)


def test_an_overwritten_single_file_goes_before_the_first_new_byte(recipe, family, tmp_path):
    out = tmp_path / "out"
    other = tmp_path / "other.yml"
    other.write_text(family.recipe("linear", MODELS, parameters={"weight": 1.0}))
    Command(other, out, shard="1GB").again()
    assert (out / "model.safetensors").exists()
    command = Command(recipe, out, shard="1GB")
    command.stopped("PendingLocalFile.write", r"\.safetensors$", 1, "--overwrite")
    assert_invisible(out)
    command.again()  # what lies there now is an unfinished run's, and needs no --overwrite
    assert os.listdir(out).count("model.safetensors") == 1
    assert_clean(out)
