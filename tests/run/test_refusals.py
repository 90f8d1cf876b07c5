"""Bad input and bad luck: one clear error, and nothing of it to be seen."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run.family import names_below, save_model, tensors_at
from run.merging import SMALL, least_memory, small_models
from run.stopping import PROCESSES

import distmerge
from distmerge.errors import (
    CheckpointError,
    DistmergeError,
    DtypeMismatch,
    MalformedCheckpoint,
    NonFiniteResult,
    OutputError,
    OutputExists,
    ParameterError,
    ShapeMismatch,
    SourceChanged,
)
from distmerge.run.events import Event
from distmerge.run.merge import plan
from distmerge.write.local_output import LocalOutput


def linear(models: list[str], **fields: Any) -> dict[str, Any]:
    named = [{"model": model} for model in models]
    recipe = {"merge_method": "linear", "models": named, "parameters": {"weight": 1.0}}
    return {**recipe, **fields}


def saved(folder: Path, **changes: dict[str, Any]) -> list[str]:
    """Two models of the tensors a to d; `first` and `second` put other tensors in."""
    models = small_models(2)
    for model, name in zip(models, ("first", "second"), strict=True):
        model.update(changes.get(name, {}))
    return [save_model(model, folder / str(i)) for i, model in enumerate(models)]


def assert_nothing_loads(folder: Path) -> None:
    names = names_below(folder)
    assert not [n for n in names if n.endswith((".tmp", "index.json"))]
    assert "model.safetensors" not in names


# --- arguments


WRONG_OPTIONS = {
    "workers": 1.5,
    "seed": -1,
    "device": "zzz",
    "overwrite": "zzz",
    "strict": 3,
    "address": 3,
    "keep_intermediates": [],
    "storage_options": "zzz",
    "overrides": "zzz",
    "listener": None,
}


@pytest.mark.parametrize(("name", "value"), WRONG_OPTIONS.items())
def test_an_option_of_a_wrong_type_is_refused_before_anything_is_written(tmp_path, name, value):
    out = tmp_path / "out"
    with pytest.raises(ParameterError, match=f"merge: {name} can't be") as raised:
        distmerge.merge(linear(saved(tmp_path)), str(out), **{name: value})
    assert f"{name}=" in str(raised.value.fix)
    assert not out.exists()


def test_not_a_number_is_no_count_and_a_misspelt_option_is_told(tmp_path):
    with pytest.raises(ParameterError, match="workers can't be nan"):
        distmerge.merge({}, str(tmp_path), workers=float("nan"))
    with pytest.raises(ParameterError, match="no option 'overwrit'") as raised:
        distmerge.merge({}, str(tmp_path), overwrit=True)
    assert raised.value.fix == "write 'overwrite='"


@pytest.mark.parametrize("given", [np.array([1, 2]), torch.tensor(1.5), torch.ones(2)])
def test_an_array_is_no_whole_number(given):
    with pytest.raises(ParameterError, match="workers can't be"):
        distmerge.merge({}, "out", workers=given)
    with pytest.raises(ParameterError, match="seed can't be"):
        distmerge.linear([{}], seed=given)
    for number in (given, np.int64(1), np.array([True])):
        with pytest.raises(ParameterError, match="overwrite can't be"):
            distmerge.merge({}, "out", overwrite=number)


def test_numbers_switches_and_devices_of_numpy_and_torch_are_as_pythons(tmp_path):
    models = [dict(model) for model in small_models(2)]
    plain = distmerge.dare_linear(models, base_index=0, density=0.5, seed=3)
    for seed in (torch.tensor(3), np.uint8(3)):
        same = distmerge.dare_linear(models, base_index=0, density=0.5, seed=seed)
        assert all(torch.equal(same[key], plain[key]) for key in plain)
    given = {"overwrite": np.True_, "device": torch.device("cpu"), "workers": np.int64(1)}
    distmerge.merge(linear(saved(tmp_path)), str(tmp_path / "out"), **given)
    assert (tmp_path / "out/model.safetensors").exists()


def test_what_fails_in_a_lazy_state_dict_is_told_as_it_is(tmp_path):
    first, second = saved(tmp_path, second={"a": torch.ones(1, 2, 3)})
    lazy = distmerge.open(first) + distmerge.open(second)
    with pytest.raises(ShapeMismatch):
        distmerge.StateDict(lazy)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: distmerge.merge(None, "out"), "A recipe is a file, .* not a NoneType"),
        (lambda: distmerge.merge([1], "out"), "Document 1 of the recipe is .* not a int"),
        (lambda: distmerge.sweep([], "out"), "A recipe is .* not a list"),
        (lambda: distmerge.search(3, "out"), "A recipe is .* not a int"),
        (lambda: distmerge.search({}, "out", trials=-1), "search: trials can't be -1"),
        (lambda: distmerge.search({}, "out", sampler=[]), "search: sampler can't be"),
        (lambda: distmerge.sweep({}, "out", scratch=3), "sweep: scratch can't be 3"),
        (lambda: distmerge.merge({"merge_method": "linear"}, 3), "An output has a name, and 3"),
        (lambda: distmerge.search({}, None), "An output has a name, and None"),
        (lambda: distmerge.open(None), "A model has a name, and None"),
        (lambda: distmerge.open("m", storage_options=3), "storage_options are a mapping"),
        (lambda: distmerge.StateDict(3), "A StateDict is made of"),
        (lambda: distmerge.LazyStateDict(3), "made of an expression"),
        (lambda: distmerge.find_method(None), "called by its name"),
        (lambda: distmerge.layer_merge(3), "is a function with a name"),
        (lambda: distmerge.dict_map(3), "needs a list"),
        (lambda: distmerge.save_importance({}, 3), "An output has a name"),
        (lambda: distmerge.save_importance({"a": 1}, "out"), "no importances"),
        (lambda: distmerge.ties([{}, {}], weights=3), "ties can't use weights=3"),
        (lambda: distmerge.dare([1]), "dare_linear merges at least 1 model"),
        (lambda: distmerge.linear([{}], out=3), "linear: out can't be 3"),
        (lambda: distmerge.linear([{}], seed=[]), "linear: seed can't be"),
        (lambda: distmerge.linear([{}], device="zzz"), "linear: device can't be"),
        (lambda: distmerge.linear([{}], passthrough=b"x"), "linear: passthrough can't be"),
    ],
)
def test_arguments_of_a_wrong_type_are_told_in_a_sentence(call, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DistmergeError, match=match):
        call()
    assert not names_below(tmp_path)


# --- sources


def test_a_file_that_changes_between_plan_and_read_is_an_error(tmp_path):
    models = saved(tmp_path)

    def listener(event: Event) -> None:
        if event.kind == "plan":
            time.sleep(0.02)
            path = Path(models[1], "model.safetensors")
            data = bytearray(path.read_bytes())
            data[-1] ^= 1  # the same size, another value
            path.write_bytes(data)

    with pytest.raises(SourceChanged, match=r"model\.safetensors"):
        distmerge.merge(linear(models), str(tmp_path / "out"), listener=listener)
    assert_nothing_loads(tmp_path / "out")


def test_a_file_replaced_in_the_middle_of_a_run_is_an_error(tmp_path):
    models = saved(tmp_path)

    def listener(event: Event) -> None:
        if event.kind == "unit" and event.data["done"] == 2:
            time.sleep(0.02)
            new = Path(models[0], "new")
            new.write_bytes(Path(models[0], "model.safetensors").read_bytes())
            new.replace(Path(models[0], "model.safetensors"))

    out = tmp_path / "out"
    with pytest.raises(SourceChanged):
        distmerge.merge(linear(models), str(out), listener=listener, max_shard_size=SMALL)
    assert_nothing_loads(out)
    # The models are other ones now: what was finished before doesn't count.
    events: list[Event] = []
    distmerge.merge(linear(models), str(out), listener=events.append, max_shard_size=SMALL)
    assert next(e.data["resumed"] for e in events if e.kind == "plan") == 0


@pytest.mark.parametrize("how", ["missing", "cut short", "one byte longer"])
def test_a_broken_shard_is_found_before_any_tensor_is_read(tmp_path, no_reads, how):
    good = save_model(small_models(1)[0], tmp_path / "good", files=2)
    bad = save_model(small_models(2)[1], tmp_path / "bad", files=2)
    shard = Path(bad, "model-00002-of-00002.safetensors")
    if how == "missing":
        shard.unlink()
    else:
        data = shard.read_bytes()
        shard.write_bytes(data[:-1] if how == "cut short" else data + b"x")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors") as raised:
        distmerge.merge(linear([good, bad]), str(tmp_path / "out"))
    assert isinstance(raised.value, MalformedCheckpoint) or how == "missing"
    assert no_reads == []
    assert not (tmp_path / "out").exists()


# --- what doesn't fit


def test_shapes_that_disagree_are_told_together_before_any_read(tmp_path, no_reads):
    models = saved(tmp_path, second={"a": torch.ones(3, 4), "c": torch.ones(5)})
    with pytest.raises(ShapeMismatch, match="2 tensors") as raised:
        distmerge.merge(linear(models), str(tmp_path / "out"))
    assert "a: 63 x 11 in 0, 3 x 4 in 1" in str(raised.value)
    assert "c: 63 x 11 in 0, 5 in 1" in str(raised.value)
    assert no_reads == []


@pytest.mark.parametrize(
    "other",
    [torch.arange(63, dtype=torch.int32), torch.zeros(63), torch.zeros(63, dtype=torch.bool)],
    ids=["int32", "float32", "bool"],
)
def test_kinds_of_numbers_that_disagree_are_refused_before_any_read(tmp_path, no_reads, other):
    models = saved(tmp_path, first={"ids": torch.arange(63)}, second={"ids": other})
    with pytest.raises(DtypeMismatch, match="kind of 1 tensor") as raised:
        distmerge.merge(linear(models), str(tmp_path / "out"))
    assert "\n  ids: I64 in 0, " in str(raised.value)
    assert no_reads == []
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("fixed_reserve")
@pytest.mark.parametrize("memory", ["much", "little"])
def test_integers_that_differ_are_an_error_that_names_the_key(tmp_path, memory):
    ids, others = torch.arange(1_000_003), torch.arange(1_000_003)
    others[-1] = 5
    models = saved(tmp_path, first={"ids": ids}, second={"ids": others})
    allowed = "2GiB"
    if memory == "little":  # streamed: the difference shows in the last of several windows
        allowed = least_memory(linear(models))
        assert plan(linear(models), allowed_mem=allowed).memory.arena // 2 < 2 * ids.nbytes
    with pytest.raises(DtypeMismatch, match=r"^ids is I64 and differs") as raised:
        distmerge.merge(linear(models), str(tmp_path / "out"), allowed_mem=allowed)
    assert "on_unequal" in str(raised.value)
    assert_nothing_loads(tmp_path / "out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_results_that_are_not_finite_are_refused_unless_that_is_said(tmp_path, bad):
    tensor = torch.ones(300_001)
    tensor[-1] = bad
    models = saved(tmp_path, first={"c": torch.ones(300_001)}, second={"c": tensor})
    out = tmp_path / "out"
    with pytest.raises(NonFiniteResult, match=r"NaN or infinity in c\."):
        distmerge.merge(linear(models), str(out))
    assert_nothing_loads(out)
    distmerge.merge(linear(models), str(out), allow_non_finite=True)
    merged = tensors_at(out)["c"]
    assert torch.isfinite(merged[:-1]).all()
    assert not torch.isfinite(merged[-1])


def test_an_overflow_of_the_written_dtype_is_not_finite_either(tmp_path):
    models = saved(tmp_path, first={"d": torch.full((7,), 65504.0)}, second={"d": torch.ones(7)})
    recipe = linear(models, parameters={"weight": 2.0, "normalize": False})
    with pytest.raises(NonFiniteResult, match=r"in d\."):
        distmerge.merge(recipe, str(tmp_path / "out"), out_dtype="float16")
    distmerge.merge(recipe, str(tmp_path / "out"), out_dtype="bfloat16")
    assert tensors_at(tmp_path / "out")["d"].dtype == torch.bfloat16


LARGE = 3e38
WEIGHTS: dict[str, tuple[str, list[float], dict[str, Any], str]] = {
    "one": ("linear", [1e308, 1.0], {}, "linear: weight can't be 1e.308"),
    "sum": ("linear", [LARGE, LARGE], {}, "add up to more than float32 holds(.|\n)*0: 3e.38, 1:"),
    "near zero": ("linear", [1.0, -1.0, 1e-300], {}, "the weights can't be divided"),
    "ties": ("ties", [1.0, LARGE, LARGE], {}, "ties: weight can't add up"),
    "lambda": ("task_arithmetic", [1.0], {"lambda": 1e39}, "lambda can't be"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_float32_cannot_hold_are_refused_before_any_read(tmp_path, no_reads, case):
    method, weights, fields, words = WEIGHTS[case]
    places = [save_model(m, tmp_path / str(i)) for i, m in enumerate(small_models(len(weights)))]
    models = [
        {"model": place, "parameters": {"weight": weight}}
        for place, weight in zip(places, weights, strict=True)
    ]
    base = {"base_model": places[0]} if method != "linear" else {}
    recipe = {"merge_method": method, "models": models, "parameters": fields, **base}
    with pytest.raises(ParameterError, match=words) as refused:
        distmerge.merge(recipe, str(tmp_path / "out"))
    assert case != "one" or places[0] in str(refused.value)
    assert not no_reads
    assert not (tmp_path / "out").exists()


# --- outputs


def test_an_output_that_may_not_be_written_is_refused(tmp_path):
    models = saved(tmp_path)
    closed = Path("/proc/self/nothing-may-be-made-here")
    with pytest.raises(OutputError, match="nothing-may-be-made-here"):
        distmerge.merge(linear(models), str(closed))
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        distmerge.merge(linear(models), str(file))
    with pytest.raises(OutputError, match="in its way"):
        distmerge.merge(linear(models), str(file / "below"))
    assert file.read_text() == "mine"


def test_a_folder_with_something_in_it_is_left_alone_unless_overwrite_is_said(tmp_path):
    models = saved(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(OutputExists, match=r"isn't empty already|isn't empty"):
        distmerge.merge(linear(models), str(out))
    assert names_below(out) == {"diary.txt"}
    distmerge.merge(linear(models), str(out), overwrite=True)
    assert (out / "diary.txt").read_text() == "mine"
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize("spelling", ["{0}", "{0}/", "{0}/../0", "file://{0}"])
def test_a_merge_onto_one_of_its_models_is_refused(tmp_path, spelling):
    models = saved(tmp_path)
    before = names_below(tmp_path)
    with pytest.raises(OutputExists, match="one of the models"):
        distmerge.merge(linear(models), spelling.format(models[0]), overwrite=True)
    assert names_below(tmp_path) == before


def test_a_merge_without_room_is_refused_before_it_begins(tmp_path, monkeypatch, no_reads):
    models = saved(tmp_path)
    monkeypatch.setattr(LocalOutput, "free_bytes", lambda self: 11_087)
    with pytest.raises(OutputError, match="has no room"):  # 4 x 63 x 11 float32 are 11,088
        distmerge.merge(linear(models), str(tmp_path / "out"))
    assert no_reads == []
    assert not (tmp_path / "out").exists() or names_below(tmp_path / "out") == set()
    monkeypatch.setattr(LocalOutput, "free_bytes", lambda self: 11_088)
    distmerge.merge(linear(models), str(tmp_path / "out"))


def test_what_is_there_already_needs_no_room(tmp_path, monkeypatch):
    models = saved(tmp_path)
    out = str(tmp_path / "out")

    def stop(event: Event) -> None:
        if event.kind == "unit" and event.data["done"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distmerge.merge(linear(models), out, listener=stop, max_shard_size=SMALL)
    monkeypatch.setattr(LocalOutput, "free_bytes", lambda self: 4_000)  # one shard's worth
    distmerge.merge(linear(models), out, max_shard_size=SMALL)
    # An old model goes before the new one is written.
    distmerge.merge(linear(models[:1]), out, max_shard_size=SMALL, overwrite=True)
    assert len(tensors_at(out)) == 4


def _full_disk(recipe: dict[str, Any], out: str) -> None:
    """A disk that is full after 500,000 bytes of a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    try:
        distmerge.merge(recipe, out)
    except OutputError as error:
        Path(out).with_suffix(".said").write_text(str(error))
        os._exit(2)


def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path):
    big = {"a": torch.ones(400_000)}
    models = saved(tmp_path, first=big, second=big)
    out = tmp_path / "out"
    process = PROCESSES.Process(target=_full_disk, args=(linear(models), str(out)))
    process.start()
    process.join()
    assert process.exitcode == 2
    assert "Could not write" in out.with_suffix(".said").read_text()
    assert not out.exists() or not [n for n in names_below(out) if "safetensors" in n]
    distmerge.merge(linear(models), str(out))


def test_on_the_command_line_errors_are_sentences_without_a_traceback(tmp_path):
    models = saved(tmp_path, second={"a": torch.ones(3, 4)})
    (tmp_path / "recipe.json").write_text(json.dumps(linear(models)))
    command = [sys.executable, "-m", "distmerge.cli", "merge", "recipe.json", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Models disagree on the shape of 1 tensor.\n  a: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
