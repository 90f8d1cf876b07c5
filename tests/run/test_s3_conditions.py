"""Merges of objects that are replaced meanwhile, on an S3 that isn't ours and knows conditions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run.family import save_model, weight_bytes
from run.merging import SMALL, small_models
from servers.s3 import VersioningS3

import distmerge
from distmerge.errors import SourceChanged
from distmerge.run.events import Event

NAME = "model.safetensors"


@pytest.fixture(scope="module")
def server() -> Iterator[VersioningS3]:
    with VersioningS3() as server:
        yield server


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("small")
    return [Path(save_model(m, folder / str(i))) for i, m in enumerate(small_models(2))]


@pytest.fixture(scope="module")
def local(models, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local") / "out"
    distmerge.merge(recipe([str(model) for model in models]), str(out), max_shard_size=SMALL)
    return weight_bytes(out)


def recipe(models: list[str]) -> dict[str, Any]:
    named = [{"model": model} for model in models]
    return {"merge_method": "linear", "models": named, "parameters": {"weight": 1.0}}


def put(server: VersioningS3, bucket: str, prefix: str, models: list[Path]) -> list[str]:
    """The models' URLs there."""
    for number, model in enumerate(models):
        for path in model.iterdir():
            key = f"{prefix}/{number}/{path.name}"
            server.client().put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    return [f"s3://{bucket}/{prefix}/{number}" for number in range(len(models))]


def once_a_unit_is_done(change: Callable[[], object]) -> Callable[[Event], None]:
    def listener(event: Event) -> None:
        if event.kind == "unit" and event.data["done"] == 1:
            change()

    return listener


def objects(server: VersioningS3, bucket: str, prefix: str) -> dict[str, bytes]:
    client = server.client()
    listed = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
    return {
        entry["Key"].removeprefix(prefix): client.get_object(Bucket=bucket, Key=entry["Key"])[
            "Body"
        ].read()
        for entry in listed
    }


def test_a_replaced_object_stops_the_run_and_nothing_is_visible(server, models, tmp_path):
    bucket, prefix = server.bucket, tmp_path.name
    urls = put(server, bucket, prefix, models)
    key = f"{prefix}/1/{NAME}"
    other = models[0].joinpath(NAME).read_bytes()
    replace = once_a_unit_is_done(
        lambda: server.client().put_object(Bucket=bucket, Key=key, Body=other)
    )
    options: dict[str, Any] = {"storage_options": server.storage_options, "max_shard_size": SMALL}
    with pytest.raises(SourceChanged) as caught:
        distmerge.merge(
            recipe(urls), f"s3://{bucket}/{prefix}/out", listener=replace, workers=1, **options
        )
    assert caught.value.headline == f"{urls[1]}/{NAME} changed after it was opened."
    assert "pinned as " in str(caught.value)
    assert "Fix: run again" in str(caught.value)
    found = objects(server, bucket, f"{prefix}/out/")
    assert not [name for name in found if name.endswith(("index.json", "lease.json"))]
    uploads = server.client().list_multipart_uploads(Bucket=bucket)
    assert uploads.get("Uploads", []) == []


@pytest.mark.parametrize("change", ["replaced", pytest.param("deleted", marks=pytest.mark.full)])
def test_of_a_versioned_bucket_the_version_is_merged_that_was_opened(
    server, models, local, tmp_path, change
):
    bucket, prefix = server.versioned, tmp_path.name
    urls = put(server, bucket, prefix, models)
    where = {"Bucket": bucket, "Key": f"{prefix}/1/{NAME}"}
    client = server.client()
    actions: dict[str, Callable[[], object]] = {
        "replaced": lambda: client.put_object(**where, Body=b"something else"),
        "deleted": lambda: client.delete_object(**where),
    }
    version = client.head_object(**where)["VersionId"]
    listener = once_a_unit_is_done(actions[change])
    options: dict[str, Any] = {"storage_options": server.storage_options, "max_shard_size": SMALL}
    distmerge.merge(
        recipe(urls), f"s3://{bucket}/{prefix}/out", listener=listener, workers=1, **options
    )
    found = objects(server, bucket, f"{prefix}/out/")
    assert {n: data for n, data in found.items() if n.startswith("model")} == local
    assert not [name for name in found if ".distmerge" in name]
    inputs = json.loads(found["distmerge.json"])["inputs"]
    assert inputs[1]["files"][NAME]["version"] == version
