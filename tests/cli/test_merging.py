"""`merge` and `plan`: options in, files and words out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from cli.commands import call, recipe, start
from safetensors.torch import load, load_file


def test_merge_writes_what_plain_torch_computes(here):
    result = call("merge", recipe(dtype="bfloat16"), "out")
    assert result.exit_code == 0, result.output
    merged = load_file("out/model.safetensors")
    a, b = load_file("a/model.safetensors"), load_file("b/model.safetensors")
    assert list(merged) == list(a)
    for key, value in merged.items():
        exact = a[key].double() * 0.25 + b[key].double() * 0.75
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.double(), exact, rtol=2**-8, atol=1e-6)


def test_options_and_overrides_reach_the_merge(here):
    path = recipe(merge_method="dare_linear", base_model="base", parameters={"density": 0.5})
    options = ["--out-dtype", "float16", "--seed", 3, "--workers", 2, "--allowed-mem", "4GiB"]
    options += ["--max-shard-size", 60, "--set", "models.0.parameters.weight=0"]
    result = call("merge", path, "out", *options)
    assert result.exit_code == 0, result.output
    weight_map = json.loads(Path("out/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) == 3
    manifest = json.loads(Path("out/distmerge.json").read_text())
    assert manifest["seed"] == 3
    assert json.dumps(manifest["expression"]).count("weight=[0, 3]") == 1
    base, b = load_file("base/model.safetensors"), load_file("b/model.safetensors")
    changed = []
    for key, file in weight_map.items():
        value = load_file(f"out/{file}")[key]
        assert value.dtype == torch.float16
        delta = value.float() - base[key]
        kept = delta.abs() > 2e-2 * (b[key] - base[key]).abs()
        assert torch.equal(delta[kept].sign(), (b[key] - base[key])[kept].sign())
        changed.append(kept.float().mean().item())
    assert 0.1 < sum(changed) / len(changed) < 0.9, "half of the entries are dropped"

    other = call("merge", path, "other", *options[:2], "--set", "models.0.parameters.weight=0")
    assert other.exit_code == 0
    assert json.loads(Path("other/distmerge.json").read_text())["seed"] == 0


def test_a_recipe_on_standard_input(here):
    text = Path(recipe()).read_text()
    process = start("merge", "-", "out", "--quiet")
    out, err = process.communicate(text, timeout=120)
    assert (process.returncode, out, err) == (0, "", "")
    assert call("verify", "out").exit_code == 0


def test_quiet_still_warns_of_what_only_the_headers_show(here):
    filters = "[{filter: nothing, value: 2.0}, {value: 1.0}]"
    setting = "models.0.parameters.weight"
    result = call("merge", recipe(), "out", "--quiet", "--set", f"{setting}={filters}")
    assert result.exit_code == 0
    assert result.stderr.startswith(f"Warning: --set {setting}: the filter 'nothing' is a part of")
    assert result.stderr.count("\n") == 1


def test_quiet_still_warns(here):
    result = call("merge", recipe(dype="float16"), "out", "--quiet")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr == "Warning: merge.yml, line 1: 'dype' is ignored here; write 'dtype'.\n"


def test_progress_in_words_has_no_control_characters_and_ends_in_a_summary(here):
    result = call("merge", recipe(dype="float16"), "out")
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert all(line.isprintable() for line in lines)
    assert lines[0].startswith("Warning: merge.yml, line 1: 'dype'")
    assert sum("'dype'" in line for line in lines) == 1, "told once"
    assert lines[1] == "3 tensors in 1 shard: 480 bytes to read, 240 bytes to write."
    assert lines[-1].startswith("3 tensors, ")
    assert lines[-1].endswith(": out")


def test_progress_for_programs(here):
    result = call("merge", recipe(dype="float16"), "out", "--json")
    assert result.exit_code == 0
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert {"notice", "plan", "progress", "unit", "publish", "done"} == set(kinds)
    assert kinds.index("plan") < kinds.index("unit") < kinds.index("done") == len(kinds) - 1
    assert sum(e["bytes_read"] for e in events if e["event"] == "progress") == 480
    assert events[-1]["url"] == "out"


def test_dry_run_writes_nothing(here):
    result = call("merge", recipe(), "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "linear(a, b, weight=[1, 3])" in result.stdout
    assert not Path("out").exists()


def test_plan_tables_and_json(here):
    result = call("plan", recipe(dtype="float16"))
    assert result.exit_code == 0, result.output
    assert "linear(a, b, weight=[1, 3])" in result.stdout
    result = call("plan", recipe(dtype="float16"), "--json")
    assert "linear(a, b, weight=[1, 3])" in json.dumps(json.loads(result.stdout))
    assert sorted(os.listdir()) == sorted(
        ["a", "b", "base", "cut", "empty", "fewer", "merge.yml", "sharded", "wider"]
    )


def test_an_output_that_is_taken(here):
    assert call("merge", recipe(), "out").exit_code == 0
    before = Path("out/model.safetensors").read_bytes()
    changed = recipe("other.yml", seed=1, dtype="float16")
    for command in ("plan", "merge"):
        result = call(command, changed, "out")
        assert result.exit_code == 2, result.output
        assert "--overwrite" in result.stderr.splitlines()[-1]
        assert Path("out/model.safetensors").read_bytes() == before
    assert call("merge", changed, "out", "--overwrite").exit_code == 0
    assert load_file("out/model.safetensors")["model.layers.0.w"].dtype == torch.float16


def test_an_output_that_is_a_file(here):
    Path("file").write_text("mine")
    for command in ("plan", "merge"):
        result = call(command, recipe(), "file")
        assert result.exit_code == 2, result.output
        assert "file" in result.stderr.splitlines()[0]
        assert result.stderr.splitlines()[-1].startswith("Fix: ")
        assert Path("file").read_text() == "mine"


def test_storage_options_are_never_shown(here):
    secret = "s3cr3t-k3y"
    path = recipe(storage_options={"s3://bucket/": {"key": "me", "secret": secret}})
    results = [call("plan", path), call("plan", path, "--json"), call("merge", path, "out")]
    for result in results:
        assert result.exit_code == 0, result.output
        assert secret not in result.output
    written = b"".join(file.read_bytes() for file in Path("out").iterdir() if file.is_file())
    assert b"linear" in written
    assert secret.encode() not in written


def test_what_looks_like_a_secret_is_in_no_log_and_on_no_terminal(here):
    secret = "hf_planted123456"
    path = recipe(passthrough=[secret])
    words = call("merge", path, "out", "--event-log", "log.jsonl")
    lines = call("merge", path, "out", "--event-log", "log.jsonl", "--overwrite", "--json")
    assert "passthrough" in Path("log.jsonl").read_text()
    files = [file.read_text(errors="replace") for file in Path("out").iterdir()]
    for text in (words.output, lines.output, Path("log.jsonl").read_text(), *files):
        assert "planted" not in text


def test_streams_without_a_terminal_get_no_bar(here, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    process = start("merge", recipe(), "out")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "\x1b" not in out + err


def test_a_recipe_with_options_for_each_bucket(here, s3):
    for name in ("a", "b"):
        content = Path(name, "model.safetensors").read_bytes()
        s3.client().put_object(Bucket=s3.bucket, Key=f"in/{name}/model.safetensors", Body=content)
    models = [
        {"model": s3.url(f"in/{name}"), "parameters": {"weight": weight}}
        for name, weight in (("a", 1), ("b", 3))
    ]
    options = {f"s3://{s3.bucket}": s3.storage_options, "s3://elsewhere": {"key": "wrong"}}
    path = recipe(models=models, storage_options=options)
    result = call("merge", path, s3.url("out"))
    assert result.exit_code == 0, result.output
    answer = s3.client().get_object(Bucket=s3.bucket, Key="out/model.safetensors")
    merged = load(answer["Body"].read())
    a, b = load_file("a/model.safetensors"), load_file("b/model.safetensors")
    for key in a:
        exact = a[key].double() * 0.25 + b[key].double() * 0.75
        torch.testing.assert_close(merged[key].double(), exact, rtol=1e-6, atol=1e-6)
    written = [s3.client().get_object(Bucket=s3.bucket, Key=key) for key in s3.keys("out/")]
    assert not any(s3.secret_key.encode() in found["Body"].read() for found in written)
