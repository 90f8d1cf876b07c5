"""Outputs that can't be written are told before anything is read, and nothing is left of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from run.family import names_below, save_model
from run.merging import small_models
from typer.testing import CliRunner, Result

import distmerge
from distmerge.cli.app import app
from distmerge.errors import OutputError, OutputExists
from distmerge.run.merge import plan
from distmerge.write.clean import clean
from distmerge.write.index import INDEX_FILE
from distmerge.write.lease import LEASE_FILE
from distmerge.write.shard import receipt_path


@pytest.fixture
def recipe(tmp_path) -> dict[str, Any]:
    models = [save_model(m, tmp_path / f"m{i}") for i, m in enumerate(small_models(2))]
    listed = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "linear", "models": listed}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (os.fsdecode(b"out-\xff"), "isn't text"),
        ("~nobody-of-that-name/out", "no user of this machine"),
        ("/", "the whole machine"),
        ("//..", "the whole machine"),
        ("dangling", "a place that isn't there"),
        ("circle", "no name for an output"),
        ("x" * 300, "no name for an output"),
        (f"new/{'x' * 300}", "no name for an output"),
        ("a\0b", "no name for an output"),
    ],
)
def test_a_name_that_no_output_can_have(recipe, tmp_path, monkeypatch, no_reads, name, told):
    monkeypatch.chdir(tmp_path)
    Path("dangling").symlink_to("nowhere")
    Path("circle").symlink_to("circle")
    before = sorted(os.listdir())
    with pytest.raises(OutputError, match=told) as caught:
        distmerge.merge(recipe, name, overwrite=True)
    assert caught.value.fix
    assert no_reads == []
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md", "vocab.txt"])
def test_folders_in_the_way_of_files(recipe, tmp_path, no_reads, name):
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    for run in (plan, distmerge.merge):
        with pytest.raises(OutputError, match="has folders where files are") as caught:
            run(recipe, str(out), overwrite=True)
        assert caught.value.facts == (name,)
    assert names_below(out) == set()
    assert no_reads == []


def test_an_output_that_had_no_room_leaves_no_folder(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("distmerge.write.local_output.LocalOutput.free_bytes", lambda self: 10)
    with pytest.raises(OutputError, match="no room"):
        distmerge.merge(recipe, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="no room"):
        distmerge.merge(recipe, str(tmp_path / "there"))
    assert (tmp_path / "there").is_dir(), "it was there before"


def test_an_output_on_no_disk_is_refused_before_it_begins(recipe):
    with pytest.raises(OutputError, match=r"/proc is on no disk"):
        plan(recipe, "/proc/nothing-may-be-made-here")


def test_a_folder_in_the_place_of_the_lease_is_one_sentence(recipe, tmp_path):
    (tmp_path / "out" / LEASE_FILE).mkdir(parents=True)
    with pytest.raises(OutputError, match=r"lease\.json can't be written"):
        distmerge.merge(recipe, str(tmp_path / "out"), overwrite=True)


def logging_to(recipe: dict[str, Any], tmp_path: Path, log: str) -> Result:
    path = tmp_path / "r.yml"
    path.write_text(str(recipe))
    command = ["merge", str(path), str(tmp_path / "out"), "--quiet", "--event-log", log]
    return CliRunner().invoke(app, command)


def test_an_event_log_without_room_is_one_sentence(recipe, tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)
    done = logging_to(recipe, tmp_path, f"/dev/fd/{full}")
    os.close(full)
    assert done.exit_code == 2
    assert f"The event log /dev/fd/{full} can't be written: No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("m0/model.safetensors", "is in the folder of"),
        ("m1/new/log.jsonl", "is in the folder of"),
        ("notes.txt", "isn't an event log"),
        ("pipe", "a pipe or a device"),
        ("out-of", "a folder, a pipe"),
        ("/dev/full", "a pipe or a device"),
    ],
)
def test_what_no_event_log_can_be_is_left_alone(recipe, tmp_path, log, told):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "out-of").mkdir()
    os.mkfifo(tmp_path / "pipe")
    weights = (tmp_path / "m0/model.safetensors").read_bytes()
    done = logging_to(recipe, tmp_path, str(tmp_path / log))
    assert done.exit_code == 2, done.output
    assert told in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Fix: ")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "m0/model.safetensors").read_bytes() == weights


def test_an_event_log_is_a_new_file_an_empty_one_a_log_or_a_stream(recipe, tmp_path):
    log = tmp_path / "log.jsonl"
    log.touch()
    counts = []
    for _ in range(2):
        assert logging_to(recipe, tmp_path, str(log)).exit_code == 0
        counts.append(len(log.read_text().splitlines()))
    assert counts[0] < counts[1]
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    assert logging_to(recipe, tmp_path, f"/dev/fd/{writing}").exit_code == 0
    assert os.read(reading, 9) == b'{"event":'
    os.close(reading)
    done = logging_to(recipe, tmp_path, f"/dev/fd/{writing}")  # nobody reads it any more
    os.close(writing)
    assert done.exit_code == 2
    assert "can't be written" in done.stderr


def test_intermediate_merges_go_to_no_models_folder_and_have_names(recipe, tmp_path, no_reads):
    def nested(name: str) -> list[dict[str, Any]]:
        return [
            {**recipe, "name": name},
            {**recipe, "models": [{**recipe["models"][0], "model": name}]},
        ]

    out = str(tmp_path / "out")
    for name, place, told in (
        ("inner", "/", "the whole machine"),
        ("inner", str(tmp_path / "m0"), "is in the folder of"),
        ("inner", str(tmp_path / "m1/kept"), "is in the folder of"),
        ("x" * 300, str(tmp_path / "kept"), "no name for an output"),
    ):
        with pytest.raises(OutputError, match=told):
            distmerge.merge(nested(name), out, keep_intermediates=place)
    shutil.copytree(tmp_path / "m0", tmp_path / "inner")
    uses = nested("inner")
    uses[1]["models"].append({**recipe["models"][0], "model": str(tmp_path / "inner")})
    with pytest.raises(OutputExists, match="holds one of the models"):
        distmerge.merge(uses, out, keep_intermediates=str(tmp_path), overwrite=True)
    with pytest.raises(OutputExists, match="intermediate merge goes, and the merge itself"):
        distmerge.merge(nested("out"), out, keep_intermediates=str(tmp_path))
    assert no_reads == []
    assert sorted(os.listdir(tmp_path)) == ["inner", "m0", "m1"]


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"]
)
def test_leftovers_beside_a_broken_index_are_left(tmp_path, index):
    receipt = tmp_path / receipt_path("d" * 32, "model-00001-of-00002.safetensors")
    receipt.parent.mkdir(parents=True)
    receipt.write_text("{}")
    (tmp_path / INDEX_FILE).write_text(index)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x")
    with pytest.raises(OutputError, match="isn't an index") as caught:
        clean(str(tmp_path))
    assert caught.value.fix
    assert (tmp_path / "model-00001-of-00002.safetensors").exists()
