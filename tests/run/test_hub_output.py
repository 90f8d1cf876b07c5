"""Merges onto the Hub: apart until one commit, resumed by whoever comes, nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run.family import MODELS, SHARD, Family, names_below, weight_bytes
from run.stopping import merge, run_until
from servers.hub import LoopbackHub
from servers.traffic import SeenRequest

import distmerge
from distmerge.errors import OutputError, OutputExists, OutputLocked
from distmerge.run.events import Event

INDEX = "model.safetensors.index.json"


def recipe(family: Family, **fields: Any) -> dict[str, Any]:
    named = [{"model": family.path(name)} for name in MODELS[1:3]]
    return {
        "merge_method": "ties",
        "base_model": family.path("base"),
        "models": named,
        "parameters": {"weight": 1.0, "density": 0.3},
        **fields,
    }


@pytest.fixture(scope="module")
def local(family: Family, tmp_path_factory) -> Path:
    """The merge on this disk, in shards."""
    out = tmp_path_factory.mktemp("local") / "merged"
    distmerge.merge(recipe(family), str(out), max_shard_size=SHARD)
    return out


@pytest.fixture
def repo(hub: LoopbackHub, monkeypatch, tmp_path) -> Iterator[str]:
    """The name of a repository that isn't there yet; this process may write it."""
    (tmp_path / "space").mkdir()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "space"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "space"))
    name = f"org/merged-{uuid.uuid4().hex[:8]}"
    yield name
    assert list((tmp_path / "space").glob("distmerge-*")) == []
    assert set(hub.branches(name)) <= {"main", "dev"}
    hub.remove_repo(name)


def files(hub: LoopbackHub, repo: str, revision: str = "main") -> dict[str, bytes]:
    found = hub.files(repo, revision)
    found.pop(".gitattributes", None)
    return found


def weights(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if name.startswith("model")}


def commits(seen: list[SeenRequest]) -> list[str]:
    return [r.path.rpartition("/")[2] for r in seen if "/commit/" in r.path and r.method == "POST"]


def test_the_hub_gets_the_bytes_of_a_merge_on_disk(hub, repo, family, local):
    events: list[Event] = []
    with hub.recording() as seen:
        written = distmerge.merge(
            recipe(family), f"hf://{repo}", max_shard_size=SHARD, listener=events.append
        )
    found = files(hub, repo)
    assert weights(found) == weight_bytes(local)
    assert set(found) == names_below(local)
    assert list(written) == list(distmerge.open(local))
    assert commits(seen).count("main") == 1
    shards = len(weights(found)) - 1
    # One commit for each shard with its receipt, the lease's, the log's, and what publishes.
    assert len(commits(seen)) == shards + 3
    card = found["README.md"].decode()
    assert f"# {repo.partition('/')[2]}\n" in card
    assert hub.token not in card + str(events)
    with hub.recording() as seen:
        distmerge.merge(recipe(family), f"hf://{repo}", max_shard_size=SHARD)
    assert commits(seen) == []


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        (("HubOutput.write_bytes", r"\.distmerge/.*/model-.*\.json$", 3), 2),
        (("HubOutput.publish", r"Merge", 1), 5),
    ],
    ids=["between shard and receipt", "before the commit"],
)
def test_a_killed_run_is_resumed_and_nothing_was_visible(
    hub, repo, family, local, tmp_path, stop, kept
):
    url, marker = f"hf://{repo}", tmp_path / "marker"
    options: dict[str, Any] = {"max_shard_size": SHARD}
    assert run_until(*stop, marker, merge, recipe(family), url, options) == -signal.SIGKILL
    assert marker.exists()
    assert files(hub, repo) == {}
    events: list[Event] = []
    with hub.recording() as seen:
        distmerge.merge(recipe(family), url, listener=events.append, **options)
    done = next(event.data for event in events if event.kind == "plan")
    assert done["resumed"] == min(kept, done["resumed"])
    shards = len(weight_bytes(local)) - 1
    assert commits(seen).count("main") == 1
    receipts = [target for target in commits(seen) if target.startswith("distmerge-")]
    assert len(receipts) == shards - done["resumed"] + 2  # and the lease's and the log's
    assert weights(files(hub, repo)) == weight_bytes(local)


def test_one_shard_is_staged_and_published_alike(hub, repo, family, tmp_path):
    url, marker = f"hf://{repo}", tmp_path / "marker"
    stop = ("HubRepository.commit", "^main$", 1)
    assert run_until(*stop, marker, merge, recipe(family), url, {}) == -signal.SIGKILL
    assert files(hub, repo) == {}
    distmerge.merge(recipe(family), url)
    alone = tmp_path / "alone"
    distmerge.merge(recipe(family), str(alone))
    found = files(hub, repo)
    assert found["model.safetensors"] == (alone / "model.safetensors").read_bytes()
    assert set(found) == names_below(alone)


def test_killed_after_the_commit_the_same_command_only_tidies_up(hub, repo, family, tmp_path):
    url, marker = f"hf://{repo}", tmp_path / "marker"
    stop = ("HubOutput.remove_below", r"\.distmerge/", 1)
    assert run_until(*stop, marker, merge, recipe(family), url, {}) == -signal.SIGKILL
    assert "model.safetensors" in files(hub, repo)
    assert len(hub.branches(repo)) == 3
    with hub.recording() as seen:
        distmerge.merge(recipe(family), url)
    assert "main" not in commits(seen)
    assert set(hub.branches(repo)) == {"main"}


def test_overwriting_keeps_the_old_model_whole_until_the_new_one_is(
    hub, repo, family, local, tmp_path
):
    url, marker = f"hf://{repo}", tmp_path / "marker"
    options: dict[str, Any] = {"max_shard_size": SHARD, "overwrite": True}
    old = recipe(family, merge_method="linear", parameters={"weight": 1.0})
    distmerge.merge(old, url, max_shard_size="2MB")
    hub.commit(repo, {"notes.txt": b"a person's own"})
    before = files(hub, repo)
    with pytest.raises(OutputExists):
        distmerge.merge(recipe(family), url, max_shard_size=SHARD)
    for stop in (
        ("HubOutput.write_bytes", r"\.distmerge/.*/model-.*\.json$", 2),
        ("HubRepository.commit", "^main$", 1),
    ):
        assert run_until(*stop, marker, merge, recipe(family), url, options) == -signal.SIGKILL
        assert files(hub, repo) == before
    distmerge.merge(recipe(family), url, **options)
    found = files(hub, repo)
    assert weights(found) == weight_bytes(local)
    assert found["notes.txt"] == b"a person's own"
    assert set(found) == {*names_below(local), "notes.txt"}


def test_a_branch_and_a_pull_request(hub, repo, family, local):
    distmerge.merge(recipe(family), f"hf://{repo}@dev", max_shard_size=SHARD)
    assert weights(files(hub, repo, "dev")) == weight_bytes(local)
    assert files(hub, repo) == {}
    hub.commit(repo, {"README.md": b"a person's own"})
    events: list[Event] = []
    distmerge.merge(
        recipe(family),
        f"hf://{repo}",
        max_shard_size=SHARD,
        pull_request=True,
        listener=events.append,
    )
    assert events[-1].data["url"] == f"hf://{repo}@refs/pr/1"
    assert weights(files(hub, repo, "refs/pr/1")) == weight_bytes(local)
    assert files(hub, repo) == {"README.md": b"a person's own"}


def test_two_runs_at_once_one_is_told(hub, repo, family):
    url = f"hf://{repo}"

    def second(event: Event) -> None:
        if event.kind == "plan":
            with pytest.raises(OutputLocked, match="Another run is writing"):
                distmerge.merge(recipe(family, out_dtype="float32"), url)

    distmerge.merge(recipe(family), url, listener=second)
    assert "model.safetensors" in files(hub, repo)


def test_verify_reads_it_from_there(hub, repo, family):
    distmerge.merge(recipe(family), f"hf://{repo}", max_shard_size=SHARD)
    told = subprocess.run(
        [sys.executable, "-m", "distmerge.cli", "verify", f"hf://{repo}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "is whole" in told.stdout


def test_too_little_temporary_space_is_told_before_anything_is_read(repo, hub, family, monkeypatch):
    hub.add_repo(repo, Path(family.path("base"), "..", "no"))
    monkeypatch.setattr("distmerge.write.hub_output.free_temporary_space", lambda: 2_000_000)
    with pytest.raises(OutputError, match="temporary folder has no room") as caught:
        distmerge.merge(recipe(family), f"hf://{repo}", max_shard_size=SHARD)
    assert "TMPDIR" in str(caught.value)
