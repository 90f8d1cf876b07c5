"""Merges between places that aren't this disk: S3, fsspec's memory, the Hub, a bad network."""

from __future__ import annotations

import json
import signal
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from run.family import MODELS, SHARD, Family, names_below, weight_bytes
from run.merging import differing
from run.stopping import merge, run_until
from servers import faulty_proxy as faults
from servers.faulty_proxy import FaultyProxy, Rule
from servers.hub import LoopbackHub
from servers.s3 import LoopbackS3

import distmerge
from distmerge.plan.memory import FAR_GROUP
from distmerge.run.events import Event
from distmerge.run.merge import plan

INDEX = "model.safetensors.index.json"


def recipe(models: list[str], **fields: Any) -> dict[str, Any]:
    """Ties of the first three of the family."""
    named = [{"model": model} for model in models[1:]]
    parameters = {"weight": 1.0, "density": 0.3}
    made = {"merge_method": "ties", "base_model": models[0], "models": named}
    return {**made, "parameters": parameters, **fields}


@pytest.fixture(scope="module")
def local(family: Family, tmp_path_factory) -> Path:
    """The merge on this disk, in shards."""
    out = tmp_path_factory.mktemp("local") / "merged"
    made = recipe([family.path(name) for name in MODELS[:3]])
    distmerge.merge(made, str(out), max_shard_size=SHARD)
    return out


@pytest.fixture(scope="module")
def remote(s3: LoopbackS3, family: Family) -> list[str]:
    """The models on S3."""
    client = s3.client()
    for name in MODELS[:3]:
        for path in sorted(names_below(family.path(name))):
            body = Path(family.path(name), path).read_bytes()
            client.put_object(Bucket=s3.bucket, Key=f"run/{name}/{path}", Body=body)
    return [s3.url(f"run/{name}") for name in MODELS[:3]]


def objects(s3: LoopbackS3, prefix: str) -> dict[str, bytes]:
    client = s3.client()
    return {
        key.removeprefix(f"{prefix}/"): client.get_object(Bucket=s3.bucket, Key=key)["Body"].read()
        for key in s3.keys(f"{prefix}/")
    }


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.startswith("model")}


@pytest.fixture
def prefix() -> str:
    return f"out-{uuid.uuid4().hex[:8]}"


def test_s3_to_s3_gives_the_bytes_of_a_merge_on_disk(s3, remote, local, prefix):
    options: dict[str, Any] = {"storage_options": s3.storage_options, "max_shard_size": SHARD}
    assert plan(recipe(remote), storage_options=s3.storage_options).memory.group == FAR_GROUP
    written = distmerge.merge(recipe(remote), s3.url(prefix), **options)
    found = objects(s3, prefix)
    assert weights(found) == weight_bytes(local)
    assert set(found) == names_below(local)
    assert s3.unfinished_uploads(prefix) == []
    assert list(written) == list(distmerge.open(local))
    secret = s3.secret_key.encode()
    assert not [name for name, data in found.items() if secret in data]
    # Again, it is there; the manifest, which tells, is all that is read of it besides headers.
    with s3.recording() as seen:
        distmerge.merge(recipe(remote), s3.url(prefix), **options)
    assert not [r for r in seen if r.method in ("PUT", "POST", "DELETE")]


@pytest.mark.full
@pytest.mark.usefixtures("cluster")
def test_s3_to_s3_by_workers_on_ray(s3, remote, local, prefix):
    distmerge.merge(
        recipe(remote),
        s3.url(prefix),
        engine="ray",
        workers=2,
        storage_options=s3.storage_options,
        max_shard_size=SHARD,
    )
    assert weights(objects(s3, prefix)) == weight_bytes(local)
    assert s3.unfinished_uploads(prefix) == []


def test_a_run_killed_in_the_middle_of_an_upload_goes_on(s3, remote, family, prefix, tmp_path):
    # One shard of more than one part, under its last name only when all is there.
    options: dict[str, Any] = {"storage_options": s3.storage_options, "out_dtype": "float32"}
    url, marker = s3.url(prefix), tmp_path / "marker"
    stop = ("PendingUpload.commit", r"model\.safetensors$", 1, marker)
    assert run_until(*stop, merge, recipe(remote), url, options) == -signal.SIGKILL
    assert marker.exists()
    assert len(s3.unfinished_uploads(prefix)) == 1
    assert {name.split("/")[0] for name in objects(s3, prefix)} == {".distmerge"}
    distmerge.merge(recipe(remote), url, **options)
    assert s3.unfinished_uploads(prefix) == []
    found = objects(s3, prefix)
    assert not [name for name in found if ".distmerge" in name]
    alone = tmp_path / "alone"
    made = recipe([family.path(name) for name in MODELS[:3]])
    distmerge.merge(made, str(alone), out_dtype="float32")
    assert found["model.safetensors"] == (alone / "model.safetensors").read_bytes()
    assert len(found["model.safetensors"]) > 16 << 20


def test_finished_shards_on_s3_are_not_written_again(s3, remote, local, prefix, tmp_path):
    options: dict[str, Any] = {"storage_options": s3.storage_options, "max_shard_size": SHARD}
    url, marker = s3.url(prefix), tmp_path / "marker"
    stop = ("FsspecOutput.write_bytes", r"\.distmerge/.*/model-.*\.json$", 3, marker)
    assert run_until(*stop, merge, recipe(remote), url, options) == -signal.SIGKILL
    assert marker.exists()
    before = objects(s3, prefix)
    assert len(weights(before)) == 3
    assert INDEX not in before
    events: list[Event] = []
    with s3.recording() as seen:
        distmerge.merge(recipe(remote), url, listener=events.append, **options)
    assert next(e.data["resumed"] for e in events if e.kind == "plan") == 2
    written = [r.path for r in seen if r.method in ("PUT", "POST") and "safetensors" in r.path]
    for name in weights(before):
        receipt = [n for n in before if n.endswith(f"/{name}.json")]
        again = [target for target in written if target.split("?")[0].endswith(f"/{name}")]
        assert bool(again) != bool(receipt)
    assert weights(objects(s3, prefix)) == weight_bytes(local)
    assert s3.unfinished_uploads(prefix) == []


def test_a_failed_merge_leaves_no_upload_behind(s3, remote, prefix):
    options: dict[str, Any] = {"storage_options": s3.storage_options, "out_dtype": "float32"}
    made = recipe(remote, parameters={"weight": 1e38, "density": 0.3, "normalize": False})
    with pytest.raises(distmerge.NonFiniteResult):
        distmerge.merge(
            {**made, "parameters": {**made["parameters"], "lambda": 1e5}}, s3.url(prefix), **options
        )
    assert s3.unfinished_uploads(prefix) == []
    assert weights(objects(s3, prefix)) == {}


def test_a_bad_network_changes_nothing(s3, remote, local, prefix):
    rules = [
        Rule(faults.Unavailable(503), r"model.*safetensors", nth=range(3, 200, 7)),
        Rule(faults.Reset(1000), r"model.*safetensors", method="GET", nth=range(5, 200, 11)),
        Rule(faults.Truncate(5000), r"model.*safetensors", method="GET", nth=range(4, 200, 13)),
    ]
    with FaultyProxy(s3.endpoint, rules) as proxy:
        options = s3.storage_options
        options["client_kwargs"] = {**options["client_kwargs"], "endpoint_url": proxy.url}
        distmerge.merge(
            recipe(remote), s3.url(prefix), storage_options=options, max_shard_size=SHARD
        )
        assert {type(fault) for fault in proxy.faults} == {
            faults.Unavailable,
            faults.Reset,
            faults.Truncate,
        }
    assert weights(objects(s3, prefix)) == weight_bytes(local)
    assert s3.unfinished_uploads(prefix) == []


def test_memory_to_memory(family, local, prefix):
    memory = fsspec.filesystem("memory")
    for name in MODELS[:3]:
        memory.put(family.path(name), f"/{prefix}/{name}", recursive=True)
    try:
        made = recipe([f"memory://{prefix}/{name}" for name in MODELS[:3]])
        distmerge.merge(made, f"memory://{prefix}/out", max_shard_size=SHARD)
        root = f"/{prefix}/out/"
        found = {p.removeprefix(root): memory.cat_file(p) for p in memory.find(root)}
        assert differing(weights(found), weight_bytes(local)) == []
        assert set(found) == names_below(local)
    finally:
        memory.rm(f"/{prefix}", recursive=True)


def test_hub_to_disk_from_pinned_commits(hub: LoopbackHub, family, local, tmp_path):
    commits = [hub.add_repo(f"family/{name}", family.path(name)) for name in MODELS[:3]]
    ids = [f"family/{name}" for name in MODELS[:3]]
    out = tmp_path / "merged"

    def listener(event: Event) -> None:
        if event.kind == "plan":  # what is pushed from now on is not merged
            hub.commit(ids[1], {"model.safetensors": b"other"})

    distmerge.merge(recipe(ids), str(out), max_shard_size=SHARD, listener=listener)
    assert weight_bytes(out) == weight_bytes(local)
    manifest = json.loads((out / "distmerge.json").read_text())
    assert [source["revision"] for source in manifest["inputs"]] == commits
    card = (out / "README.md").read_text()
    assert all(name in card for name in ids)
    assert "base_model_relation: merge" in card
