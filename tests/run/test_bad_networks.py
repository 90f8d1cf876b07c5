"""Merges whose inputs or output are behind a network that does what networks do."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run.family import MODELS, SHARD, Family, names_below, weight_bytes
from servers import faulty_proxy as faults
from servers.faulty_proxy import FaultyProxy, Rule

import distmerge
from distmerge.checkpoints import http_ranges, parallel
from distmerge.errors import OutputError, ReadFailed, SourceChanged
from distmerge.write import hub_repository

WEIGHTS = r"model.*safetensors"
QUIET = 0.5
"""Seconds of silence that a client stands in these tests."""


def recipe(models: list[str]) -> dict[str, Any]:
    named = [{"model": model} for model in models[1:]]
    parameters = {"weight": 1.0, "density": 0.3}
    return {
        "merge_method": "ties",
        "base_model": models[0],
        "models": named,
        "parameters": parameters,
    }


@pytest.fixture(scope="module")
def local(family: Family, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("local") / "merged"
    distmerge.merge(recipe([family.path(n) for n in MODELS[:3]]), str(out), max_shard_size=SHARD)
    return out


@pytest.fixture(autouse=True)
def _small_requests(monkeypatch) -> None:
    """Enough of them for a fault of each kind, and little patience."""
    monkeypatch.setattr(parallel, "PART", 1 << 20)
    monkeypatch.setattr(http_ranges, "SILENCE_SECONDS", QUIET)


def behind(s3: Any, proxy: FaultyProxy) -> dict[str, Any]:
    """Storage options that reach S3 through the proxy."""
    options: dict[str, Any] = s3.storage_options
    options["client_kwargs"] |= {"endpoint_url": proxy.url}
    return {**options, "config_kwargs": {"read_timeout": QUIET}}


@pytest.fixture(params=["s3", "hub"])
def source(request, family: Family, monkeypatch) -> Iterator[tuple[FaultyProxy, list[str], Any]]:
    """A proxy, the models behind it, and what a merge needs to be told."""
    name = f"bad-{uuid.uuid4().hex[:6]}"
    if request.param == "s3":
        s3 = request.getfixturevalue("s3")
        for model in MODELS[:3]:
            for path in sorted(names_below(family.path(model))):
                body = Path(family.path(model), path).read_bytes()
                s3.client().put_object(Bucket=s3.bucket, Key=f"{name}/{model}/{path}", Body=body)
        with FaultyProxy(s3.endpoint) as proxy:
            models = [s3.url(f"{name}/{model}") for model in MODELS[:3]]
            yield proxy, models, {"storage_options": behind(s3, proxy)}
    else:
        hub = request.getfixturevalue("hub")
        models = [f"{name}/{model}" for model in MODELS[:3]]
        for model in MODELS[:3]:
            hub.add_repo(f"{name}/{model}", family.path(model))
        with FaultyProxy(hub.storage_url) as proxy:
            hub.cdn_url = proxy.url
            yield proxy, models, {}
        for model in models:
            hub.remove_repo(model)


def test_passing_faults_change_nothing(source, local, tmp_path):
    proxy, models, options = source
    passing = [
        (faults.Unavailable(503, retry_after=1), 3),
        (faults.Reset(after_bytes=1000), 5),
        (faults.Truncate(after_bytes=1000), 7),
        (faults.Shorten(to_bytes=1000), 9),
        (faults.Slow(0.1, bytes_per_second=4e6), 11),
        (faults.Hang(2 * QUIET), 13),
        (faults.Unavailable(429), 15),
    ]
    if not options:  # the Hub: signed addresses expire, and are asked for again
        passing.append((faults.Unavailable(403), 17))
    proxy.rules += [Rule(fault, WEIGHTS, "GET", nth=n) for fault, n in passing]
    begin = time.monotonic()
    distmerge.merge(recipe(models), str(tmp_path / "out"), max_shard_size=SHARD, **options)
    assert set(proxy.faults) == {fault for fault, _ in passing}
    assert time.monotonic() - begin > 1  # which the server asked for
    assert weight_bytes(tmp_path / "out") == weight_bytes(local)


@pytest.mark.full
@pytest.mark.parametrize("fault", [faults.Unavailable(503), faults.Hang()], ids=repr)
def test_faults_that_stay_are_an_error_and_nothing_is_visible(source, tmp_path, monkeypatch, fault):
    proxy, models, options = source
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    proxy.rules.append(Rule(fault, WEIGHTS, "GET", nth=range(8, 10_000)))
    with pytest.raises(ReadFailed, match=r"bytes \d+:\d+(.|\n)*6 attempts"):
        distmerge.merge(recipe(models), str(tmp_path / "out"), max_shard_size=SHARD, **options)
    assert not [n for n in names_below(tmp_path / "out") if n.endswith(("index.json", "tmp"))]


def test_an_object_that_changes_half_way_stops_the_run(s3, family, tmp_path):
    name = f"bad-{uuid.uuid4().hex[:6]}"
    client = s3.client()
    for model in MODELS[:2]:
        data = Path(family.path(model), "model.safetensors").read_bytes()
        client.put_object(Bucket=s3.bucket, Key=f"{name}/{model}/model.safetensors", Body=data)
    models = [s3.url(f"{name}/{model}") for model in MODELS[:2]]

    def listener(event: Any) -> None:
        if event.kind == "unit" and event.data["done"] == 1:
            key = f"{name}/{MODELS[1]}/model.safetensors"
            client.put_object(Bucket=s3.bucket, Key=key, Body=data[:-2] + b"xx")

    out = s3.url(f"{name}/out")
    with pytest.raises(SourceChanged, match=rf"{MODELS[1]}/model.safetensors changed"):
        distmerge.merge(
            recipe(models),
            out,
            max_shard_size=SHARD,
            listener=listener,
            storage_options=s3.storage_options,
        )
    assert not [key for key in s3.keys(f"{name}/out/") if key.endswith("index.json")]
    assert s3.unfinished_uploads(name) == []


def test_writing_to_s3_through_a_bad_network(s3, family, local):
    name = f"bad-{uuid.uuid4().hex[:6]}"
    passing = [
        Rule(faults.Unavailable(503, retry_after=1), r"model-", "PUT", nth=2),
        Rule(faults.Reset(), r"model-", "PUT", nth=4),
        Rule(faults.Hang(2 * QUIET), r"model-", "PUT", nth=5),
        Rule(faults.Truncate(), r"config", "PUT", nth=1),
    ]
    with FaultyProxy(s3.endpoint, passing) as proxy:
        models = [family.path(model) for model in MODELS[:3]]
        options = {"storage_options": behind(s3, proxy)}
        distmerge.merge(recipe(models), s3.url(name), max_shard_size=SHARD, **options)
        assert len({type(fault) for fault in proxy.faults}) >= 3
    body = {
        key.removeprefix(f"{name}/"): s3.client().get_object(Bucket=s3.bucket, Key=key)["Body"]
        for key in s3.keys(f"{name}/model")
    }
    assert {path: stream.read() for path, stream in body.items()} == weight_bytes(local)
    assert s3.unfinished_uploads(name) == []


def test_writing_to_the_hub_through_a_bad_network(hub, family, local, monkeypatch):
    repo = f"org/bad-{uuid.uuid4().hex[:6]}"
    passing = [
        Rule(faults.Unavailable(503, retry_after=1), "/commit/", "POST", nth=2),
        Rule(faults.Reset(), "/commit/", "POST", nth=4),
        Rule(faults.Truncate(5), "/tree/", "GET", nth=3),
        Rule(faults.Unavailable(429), "/branch/", "POST", nth=2),
        Rule(faults.Hang(3600), "/tree/", "GET", nth=6),
    ]
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr(hub_repository, "PATIENCE", 2 * QUIET)
    with FaultyProxy(hub.endpoint, passing) as proxy:
        monkeypatch.setenv("HF_ENDPOINT", proxy.url)
        models = [family.path(model) for model in MODELS[:3]]
        distmerge.merge(recipe(models), f"hf://{repo}", max_shard_size=SHARD)
        assert {type(fault) for fault in proxy.faults} == {type(rule.fault) for rule in passing}
    found = {n: data for n, data in hub.files(repo).items() if n.startswith("model")}
    assert found == weight_bytes(local)
    assert set(hub.branches(repo)) == {"main"}
    hub.remove_repo(repo)


def test_an_output_that_stays_away_is_an_error(s3, family, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    name = f"bad-{uuid.uuid4().hex[:6]}"
    with FaultyProxy(s3.endpoint, [Rule(faults.Unavailable(503), "model-", "PUT")]) as proxy:
        models = [family.path(model) for model in MODELS[:3]]
        options = {"storage_options": behind(s3, proxy)}
        with pytest.raises(OutputError, match="Could not write"):
            distmerge.merge(recipe(models), s3.url(name), max_shard_size=SHARD, **options)
    assert [key for key in s3.keys(f"{name}/") if "model" in key] == []
