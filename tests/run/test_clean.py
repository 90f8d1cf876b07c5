"""`distmerge clean` after killed runs, on this disk, on S3 and on the Hub."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from run.family import MODELS, names_below, save_model
from run.merging import SMALL, small_models
from run.places import BEFORE_A_RECEIPT
from run.stopping import merge, run_until

import distmerge
from distmerge.checkpoints import spool
from distmerge.errors import OutputError, OutputExists, OutputLocked
from distmerge.run.events import Event
from distmerge.write.clean import clean
from distmerge.write.lease import LEASE_FILE, lease
from distmerge.write.local_output import LocalOutput


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("small")
    models = [save_model(m, folder / str(i)) for i, m in enumerate(small_models(2))]
    named = [{"model": model} for model in models]
    return {"merge_method": "linear", "models": named, "parameters": {"weight": 1.0}}


def test_a_killed_runs_leftovers_go_and_what_is_published_stays(place, recipe, tmp_path):
    options: dict[str, Any] = {"max_shard_size": SMALL, **place.options}
    stop = place.before_a_receipt
    marker = tmp_path / "marker"
    assert run_until(*stop, marker, merge, recipe, place.url, options) == -signal.SIGKILL
    assert place.names()
    found = clean(place.url, **place.options)
    shards = len([name for name in found.files if name.startswith("model-")])
    assert found.unfinished == 1 if place.kind == "hub" else shards >= 2
    assert place.names() == set()
    assert clean(place.url, **place.options) == clean(place.url, **place.options)

    distmerge.merge(recipe, place.url, **options)
    published = place.names()
    assert clean(place.url, **place.options).files == ()
    assert place.names() == published
    # A merge that replaces it, killed on its way.
    options["overwrite"] = True
    changed = {**recipe, "parameters": {"weight": 0.5, "normalize": False}}
    assert run_until(*stop, marker, merge, changed, place.url, options) == -signal.SIGKILL
    clean(place.url, **place.options)
    assert place.names() == (published if place.kind == "hub" else set())


def test_a_living_run_is_not_disturbed(place, recipe):
    def look(event: Event) -> None:
        if event.kind == "unit":
            with pytest.raises(OutputLocked, match="Another run is writing"):
                clean(place.url, **place.options)

    distmerge.merge(recipe, place.url, max_shard_size=SMALL, listener=look, **place.options)


@pytest.mark.full
def test_an_upload_that_a_killed_run_began_is_aborted(s3, family, tmp_path):
    name, marker = f"clean-{uuid.uuid4().hex[:8]}", tmp_path / "marker"
    url, options = s3.url(name), {"storage_options": s3.storage_options}
    # One shard of more than one part, each of which is on S3 when the run dies.
    models = [{"model": family.path(model)} for model in MODELS[:2]]
    made = {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}}
    stop = ("PendingUpload.commit", r"model\.safetensors$", 1, marker)
    given = {**options, "out_dtype": "float32"}
    assert run_until(*stop, merge, made, url, given) == -signal.SIGKILL
    assert marker.exists()
    assert len(s3.unfinished_uploads(name)) == 1
    assert clean(url, **options).unfinished == 1
    assert s3.unfinished_uploads(name) == []
    assert s3.keys(f"{name}/") == []


def test_orphaned_uploads_are_aborted_and_others_kept(s3):
    name = f"clean-{uuid.uuid4().hex[:8]}"
    client = s3.client()
    for key in (f"{name}/out/model.safetensors", f"{name}/out-2/model.safetensors"):
        client.create_multipart_upload(Bucket=s3.bucket, Key=key)
    found = clean(s3.url(f"{name}/out"), storage_options=s3.storage_options)
    assert (found.files, found.unfinished) == ((), 1)
    assert s3.unfinished_uploads(name) == [f"{name}/out-2/model.safetensors"]


def test_what_a_killed_sweep_kept_of_its_inputs_goes_unless_one_uses_it(tmp_path):
    place = str(tmp_path / f"{spool.PREFIX}0123")
    with spool.make(place, limit=1):
        (spool.folder_of(place) / "weights.data").write_bytes(b"x")
        assert clean(str(tmp_path)).unfinished == 0
        assert spool.folder_of(place).is_dir()
    found = clean(str(tmp_path))
    assert (found.files, found.unfinished) == ((), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("link", [".distmerge", "linked"])
def test_nothing_is_deleted_or_written_through_a_link(recipe, tmp_path, link):
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    theirs.mkdir()
    out.mkdir()
    names = {"thesis.txt", "notes.0123456789abcdef.tmp"}
    for name in names:
        (theirs / name).write_text("x")
    (out / link).symlink_to("../theirs")
    if link == ".distmerge":
        refused = pytest.raises(OutputError, match="is a link to another folder")
        with refused:
            clean(str(out))
        with refused:
            distmerge.merge(recipe, str(out), overwrite=True)
    else:
        assert clean(str(out)).unfinished == 0
        distmerge.merge(recipe, str(out), overwrite=True)
    assert names_below(theirs) == names


def test_a_model_whose_file_lies_in_the_output_is_not_replaced(tmp_path):
    models = [save_model(m, tmp_path / str(i)) for i, m in enumerate(small_models(2))]
    out = tmp_path / "out"
    out.mkdir()
    weights = Path(models[0], "model.safetensors")
    weights.rename(out / weights.name)
    weights.symlink_to(out / weights.name)
    named = [{"model": model} for model in models]
    blend = {"merge_method": "linear", "models": named, "parameters": {"weight": 1.0}}
    with pytest.raises(OutputExists, match="holds one of the models"):
        distmerge.merge(blend, str(out), overwrite=True)
    assert weights.is_file()
    assert names_below(out) == {weights.name}


def test_a_persons_own_files_are_not_touched(tmp_path):
    own = {"model-00001-of-00002.safetensors", "notes.txt"}
    for name in own:
        (tmp_path / name).write_bytes(b"mine")
    assert clean(str(tmp_path)).files == ()
    assert names_below(tmp_path) == own
    nowhere = tmp_path / "not" / "there"
    with pytest.raises(OutputError, match="Nothing is at"):
        clean(str(nowhere))
    assert not nowhere.exists()


def test_what_lies_among_a_runs_files_and_isnt_its_own_stays(recipe, tmp_path):
    own = {".distmerge/notes.txt", ".distmerge/theirs/paper.md", ".distmerge/theirs/x.json"}
    shards = {f"model-0000{i}-of-0000{n}.safetensors" for i, n in ((1, 1), (1, 2), (2, 2))}
    for name in own | shards:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    assert clean(str(tmp_path)).files == ()
    assert names_below(tmp_path) == own | shards
    with pytest.raises(OutputExists):
        distmerge.merge(recipe, str(tmp_path))
    # A search that was killed before it wrote anything has left its lease.
    with lease(LocalOutput(tmp_path)):
        left = (tmp_path / LEASE_FILE).read_text()
    (tmp_path / LEASE_FILE).write_text(json.dumps({**json.loads(left), "heartbeat": 0.0}))
    assert clean(str(tmp_path)).files == ()
    assert names_below(tmp_path) == own | shards
    # Of a run of three shards that failed, the log and one shard without its receipt.
    log = f".distmerge/{'d' * 32}/events.jsonl"
    begun = "model-00001-of-00003.safetensors"
    (tmp_path / log).parent.mkdir()
    plans = [Event("plan", {"units": units}).json() for units in (1, 3)]
    (tmp_path / log).write_text("\n".join(plans) + "\n")
    (tmp_path / begun).write_bytes(b"x")
    assert set(clean(str(tmp_path)).files) == {log, begun}
    assert names_below(tmp_path) == own | shards
    distmerge.merge(recipe, str(tmp_path), overwrite=True)
    assert own < names_below(tmp_path)


def test_on_the_command_line(recipe, tmp_path):
    out, marker = tmp_path / "out", tmp_path / "marker"
    options: dict[str, Any] = {"max_shard_size": SMALL}
    assert run_until(*BEFORE_A_RECEIPT["local"], marker, merge, recipe, str(out), options)
    run = [sys.executable, "-m", "distmerge.cli", "clean", str(out), "--json"]
    told = subprocess.run(run, capture_output=True, check=True)
    assert len(json.loads(told.stdout)["files"]) >= 4
    assert names_below(out) == set()
    again = subprocess.run(run[:-1], capture_output=True, text=True, check=True)
    assert again.stdout == f"{Path(out)}: 0 files and 0 unfinished things removed.\n"
