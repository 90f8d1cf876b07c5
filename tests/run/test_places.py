"""Promises that hold wherever a merge goes to: this disk, S3, the Hub."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from dataclasses import asdict
from typing import Any

import pytest
from run.family import save_model
from run.merging import SMALL, small_models
from run.places import Place
from run.stopping import merge, run_until

import distmerge
from distmerge.errors import OutputExists, OutputLocked
from distmerge.run.events import Event
from distmerge.write.lease import LEASE_FILE, Lease, read_lease
from distmerge.write.output import open_output

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("small")
    models = [save_model(m, folder / str(i)) for i, m in enumerate(small_models(2))]
    named = [{"model": model} for model in models]
    return {"merge_method": "linear", "models": named, "parameters": {"weight": 1.0}}


@pytest.fixture(scope="module")
def other(recipe) -> dict[str, Any]:
    """Another merge with shards of the same names and sizes."""
    return {**recipe, "parameters": {"weight": 0.25, "normalize": False}}


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.startswith("model")}


@pytest.fixture(scope="module")
def alone(recipe, other, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The bytes of both merges, on a disk of their own."""
    found = {}
    for name, what in (("recipe", recipe), ("other", other)):
        out = tmp_path_factory.mktemp(name) / "out"
        distmerge.merge(what, str(out), max_shard_size=SMALL)
        found[name] = {path.name: path.read_bytes() for path in out.glob("model*")}
    return found


def test_of_two_runs_at_once_one_wins_and_the_other_is_told(place: Place, recipe, other, alone):
    told = []

    def second(event: Event) -> None:
        if event.kind == "unit":
            with pytest.raises(OutputLocked, match=f"process {os.getpid()}") as caught:
                distmerge.merge(
                    other, place.url, max_shard_size=SMALL, overwrite=True, **place.options
                )
            told.append(caught.value)

    distmerge.merge(recipe, place.url, max_shard_size=SMALL, listener=second, **place.options)
    assert told
    assert weights(place.files()) == alone["recipe"]
    assert not [name for name in place.names() if "distmerge" in name and "json" not in name]


@pytest.mark.parametrize("age", [1.0, 10_000.0])
def test_a_lease_of_another_machine_holds_until_it_expires(place: Place, recipe, alone, age):
    output = open_output(place.url, place.options.get("storage_options"))
    expires = 6 * output.heartbeat
    heartbeat = time.time() - min(age, expires + 1)
    lease = Lease("other", "elsewhere", 1, 0.0, heartbeat, expires)
    output.begin("0123456789abcdef")
    output.write_bytes(LEASE_FILE, json.dumps(asdict(lease)).encode())
    assert read_lease(output) == lease
    if age < expires:
        with pytest.raises(OutputLocked, match="on elsewhere"):
            distmerge.merge(recipe, place.url, max_shard_size=SMALL, **place.options)
        assert read_lease(output) == lease
        assert weights(place.files()) == {}
        output.delete(LEASE_FILE)
    else:
        distmerge.merge(recipe, place.url, max_shard_size=SMALL, **place.options)
        assert weights(place.files()) == alone["recipe"]
        assert socket.gethostname()
        assert read_lease(output) is None


def test_overwriting_killed_half_way_leaves_no_index_over_mixed_shards(
    place: Place, recipe, other, alone, tmp_path
):
    distmerge.merge(recipe, place.url, max_shard_size=SMALL, **place.options)
    options: dict[str, Any] = {"max_shard_size": SMALL, "overwrite": True, **place.options}
    stop, marker = place.before_a_receipt, tmp_path / "marker"
    with pytest.raises(OutputExists):
        distmerge.merge(other, place.url, max_shard_size=SMALL, **place.options)
    assert run_until(*stop, marker, merge, other, place.url, options) == -signal.SIGKILL
    assert marker.exists()
    found = weights(place.files())
    assert INDEX not in found or found == alone["recipe"]
    distmerge.merge(other, place.url, **options)
    assert weights(place.files()) == alone["other"]
    assert place.unfinished() == []
