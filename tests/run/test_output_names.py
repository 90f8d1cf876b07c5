"""Outputs that can't be written are told before anything is read, and nothing is left of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from run.family import names_below, save_model
from run.merging import small_models
from typer.testing import CliRunner

import distmerge
from distmerge.cli.app import app
from distmerge.errors import OutputError
from distmerge.run.merge import plan
from distmerge.write.clean import clean
from distmerge.write.index import INDEX_FILE
from distmerge.write.shard import STAGING


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


def test_an_event_log_without_room_is_one_sentence(recipe, tmp_path):
    path = tmp_path / "r.yml"
    path.write_text(str(recipe))
    command = ["merge", str(path), str(tmp_path / "out"), "--event-log", "/dev/full"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "The event log /dev/full can't be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"]
)
def test_leftovers_beside_a_broken_index_are_left(tmp_path, index):
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING / "receipt.json").write_text("{}")
    (tmp_path / INDEX_FILE).write_text(index)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x")
    with pytest.raises(OutputError, match="isn't an index") as caught:
        clean(str(tmp_path))
    assert caught.value.fix
    assert (tmp_path / "model-00001-of-00002.safetensors").exists()
