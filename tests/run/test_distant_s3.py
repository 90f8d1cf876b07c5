"""Merges of models that are far away: a long, narrow and faulty way to an S3 that isn't ours."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from run.family import MODELS, SHARD, Family, weight_bytes
from servers.faulty_proxy import FaultyProxy
from servers.s3 import DistantS3

import distmerge
from distmerge.checkpoints import parallel
from distmerge.checkpoints.fsspec_store import FsspecStore
from distmerge.checkpoints.retry import RetryPolicy
from distmerge.errors import AccessDenied, ReadFailed

pytestmark = pytest.mark.full
MB = 10**6
PART = 1 << 18


@pytest.fixture(autouse=True)
def _small_requests(monkeypatch) -> None:
    monkeypatch.setattr(parallel, "PART", PART)


def recipe(models: list[str]) -> dict[str, Any]:
    named = [{"model": model} for model in models[1:]]
    parameters = {"weight": 1.0, "density": 0.3}
    made = {"merge_method": "ties", "base_model": models[0], "models": named}
    return {**made, "parameters": parameters}


@pytest.fixture(scope="module")
def local(family: Family, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("local") / "merged"
    distmerge.merge(recipe([family.path(n) for n in MODELS[:3]]), str(out), max_shard_size=SHARD)
    return out


def read_head(server: DistantS3, options: dict[str, Any], **more: Any) -> bytes:
    """The first of one model's weights, in sixteen requests."""
    store = FsspecStore(server.url("base"), options, **more)
    buffer = bytearray(16 * PART)
    store.read_into(store.files()["model.safetensors"], 0, memoryview(buffer))
    store.close()
    return bytes(buffer)


def expected(family: Family) -> bytes:
    return Path(family.path("base"), "model.safetensors").read_bytes()[: 16 * PART]


@pytest.mark.parametrize(
    "shaping",
    [
        {"latency_ms": 20, "latency_jitter_ms": 50, "bandwidth_mbps": 40},
        {"latency_ms": 20, "total_bandwidth_mbps": 160, "error_rate": 0.05, "fault_seed": 1},
    ],
    ids=lambda shaping: ",".join(shaping),
)
def test_a_long_narrow_and_faulty_way_changes_nothing(family, local, tmp_path, shaping):
    with DistantS3(family.folder, **shaping) as server:
        urls = [server.url(name) for name in MODELS[:3]]
        out = tmp_path / "out"
        begin = time.monotonic()
        distmerge.merge(
            recipe(urls), str(out), max_shard_size=SHARD, storage_options=server.storage_options
        )
        seconds = time.monotonic() - begin
    assert weight_bytes(out) == weight_bytes(local)
    if "total_bandwidth_mbps" in shaping:
        read = sum(Path(family.path(n), "model.safetensors").stat().st_size for n in MODELS[:3])
        assert seconds > read / (shaping["total_bandwidth_mbps"] / 8 * MB), "it was no narrow way"


def test_many_requests_are_under_way_at_once(family):
    with DistantS3(family.folder, latency_ms=1000) as server:
        begin = time.monotonic()
        assert read_head(server, server.storage_options) == expected(family)
        assert time.monotonic() - begin < 12, "one by one, sixteen take sixteen seconds"


def test_what_is_refused_for_a_while_is_asked_again(family):
    """Its 503s are answers of its own, as when S3 says SlowDown."""
    with (
        DistantS3(family.folder, error_rate=0.2, fault_seed=3) as server,
        FaultyProxy(server.endpoint) as counting,
    ):
        options = server.storage_options
        options["client_kwargs"]["endpoint_url"] = counting.url
        patient = RetryPolicy(attempts=20, base=0.01)
        assert read_head(server, options, policy=patient) == expected(family)
        asked = [r.range for r in counting.seen if r.method == "GET" and r.range]
    assert len(set(asked)) == 16
    assert len(asked) > 16


def test_what_is_always_refused_is_an_error(family, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with (
        DistantS3(family.folder, error_rate=1.0) as server,
        pytest.raises(ReadFailed, match=r"file list(.|\n)*6 attempts(.|\n)*reduce your request"),
    ):
        read_head(server, server.storage_options)


def test_its_own_check_of_signatures_refuses_a_wrong_secret(family):
    with DistantS3(family.folder) as server, pytest.raises(AccessDenied) as caught:
        read_head(server, server.storage_options | {"secret": "hunter2hunter2"})
    assert "hunter2" not in str(caught.value)
