"""What users of mergekit type: understood, or answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli.commands import call, recipe
from safetensors.torch import load_file

from distmerge.cli.mergekit_flags import translated

USUAL = "--copy-tokenizer --lazy-unpickle --out-shard-size 5B --allow-crimes --trust-remote-code"


@pytest.mark.parametrize(
    ("given", "ours", "answered"),
    [
        ("--cuda --random-seed 7", ["--device", "cuda", "--seed", "7"], []),
        ("--out-shard-size=5B -j 4", ["--max-shard-size", "5B", "--workers", "4"], []),
        ("--gpu-rich --no-quiet", ["--device", "cuda"], []),
        ("a.yml out --copy-tokenizer", ["a.yml", "out"], []),
        ("- out", ["-", "out"], []),
        ("--lazy-unpickle --async-write", [], ["never unpickled", "overlaps"]),
        ("--lora-merge-cache /x --transformers-cache=/y", [], ["adapters are", "downloaded whole"]),
        ("-vv --read-to-gpu --multi-gpu", [], ["distmerge plan", "--allowed-mem", "--engine ray"]),
        ("--no-copy-tokenizer --write-threads 3", [], ["always copied", "overlaps"]),
        ("a.yml --out-path out -I mid", ["a.yml", "out", "--keep-intermediates", "mid"], []),
        (
            "--set parameters.weight=-1 -- --cuda",
            ["--set", "parameters.weight=-1", "--", "--cuda"],
            [],
        ),
    ],
)
def test_flags_are_translated_or_answered(given, ours, answered):
    found, notes = translated(given.split())
    assert found == ours
    assert len(notes) == len(answered)
    for note, text in zip(notes, answered, strict=True):
        assert text in note
        assert note.startswith("-")
        assert note.endswith(".")


def test_a_command_line_of_mergekits_runs(here):
    path = recipe(merge_method="dare_linear", base_model="base", parameters={"density": 0.5})
    result = call("merge", path, "out", *USUAL.split(), "--random-seed", 3)
    assert result.exit_code == 0, result.output
    assert sum(line.startswith("Note: --") for line in result.stderr.splitlines()) == 3
    assert call("merge", path, "same", "--seed", 3, "--quiet", "--allow-crimes").stderr == ""
    ours, theirs = (load_file(f"{out}/model.safetensors") for out in ("same", "out"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_would_change_the_result_is_refused(here):
    result = call("merge", recipe(), "out", "--unsafe-truncate-embeddings")
    assert result.exit_code == 2
    assert "tokenizer: {source: base}" in result.stderr
    assert not Path("out").exists()


def test_the_recipe_is_kept_in_the_output(here):
    call("merge", recipe(dtype="float16"), "out", "--quiet")
    assert Path("out/mergekit_config.yml").read_text() == Path("merge.yml").read_text()
    files = json.loads(Path("out/distmerge.json").read_text())["files"]
    assert "mergekit_config.yml" in files
    assert call("verify", "out").exit_code == 0


SEVERAL = """\
name: mean
merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1}}
out_dtype: float16
---
merge_method: slerp
models: [base, mean]
parameters: {t: 0.5}
"""


def test_intermediates_are_written_when_asked_for_and_change_nothing(here):
    Path("merge.yml").write_text(SEVERAL)
    plain = call("merge", "merge.yml", "out")
    assert plain.exit_code == 0, plain.output
    assert "out_dtype of 'mean' count only with --keep-intermediates" in plain.stderr
    kept = call("merge", "merge.yml", "other", "--intermediate-dir", "mid", "--quiet")
    assert kept.exit_code == 0, kept.output
    one, two = (load_file(f"{out}/model.safetensors") for out in ("out", "other"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    mean = load_file("mid/mean/model.safetensors")
    a, b = (load_file(f"{name}/model.safetensors") for name in "ab")
    assert all(torch.equal(mean[key], ((a[key] + b[key]) / 2).half()) for key in mean)
    assert Path("out/mergekit_config.yml").read_text() == SEVERAL


def test_no_intermediate_is_written_for_a_merge_that_is_refused(here):
    Path("merge.yml").write_text(SEVERAL)
    assert call("merge", recipe("other.yml"), "out", "--quiet").exit_code == 0
    result = call("merge", "merge.yml", "out", "--keep-intermediates", "mid")
    assert result.exit_code == 2
    assert not Path("mid").exists()


def test_a_names_folder_stays_below_the_place(here):
    Path("merge.yml").write_text(SEVERAL.replace("mean", "../mean"))
    result = call("merge", "merge.yml", "out", "--keep-intermediates", "mid")
    assert result.exit_code == 2
    assert "can't be a folder's name" in result.stderr
    assert not Path("out").exists()
