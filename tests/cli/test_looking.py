"""`--help`, `inspect`, `verify` and `methods`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from cli.commands import REPOSITORY, call, make_model, recipe, start

from distmerge.methods.registry import method_names


def test_help_is_there_at_once_and_loads_nothing_heavy():
    times = []
    for _ in range(6):
        before = os.times()
        process = start("--help")
        out, err = process.communicate(timeout=60)
        after = os.times()
        spent = after.children_user - before.children_user
        times.append(spent + after.children_system - before.children_system)
        assert process.returncode == 0, err
    for name in ("merge", "plan", "inspect", "verify", "clean", "methods", "demo"):
        assert f"\n  {name} " in out
    assert min(times) < 0.5, "seconds of processor time, so that a busy machine is no excuse"

    code = (
        "import sys; from distmerge.cli import app; from typer.testing import CliRunner;"
        "assert CliRunner().invoke(app, ['merge', '--help']).exit_code == 0;"
        "heavy = {'torch', 'ray', 'transformers', 'fsspec', 'huggingface_hub', 'numpy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == "[]", out.stderr


def test_inspect(here):
    found = json.loads(call("inspect", "a", "--json", "--keys").stdout)
    assert found["url"] == "a"
    assert found["tensors"] == 3
    assert found["parameters"] == 7 * 4 + 2 * 16
    assert found["bytes"] == 4 * found["parameters"]
    assert found["dtypes"] == {"F32": {"tensors": 3, "parameters": 60, "bytes": 240}}
    assert found["layers"] == {"model.layers": 2}
    assert found["keys"]["model.embed.weight"] == {"dtype": "F32", "shape": [7, 4], "bytes": 112}
    assert "keys" not in json.loads(call("inspect", "a", "--json").stdout)
    shown = call("inspect", "a", "--keys").stdout
    assert "safetensors" in shown
    assert "model.layers.1.w" in shown
    assert "model.layers.1.w" not in call("inspect", "a").stdout


def test_a_model_that_is_not_on_the_hub(here, hub):
    result = call("inspect", "org/nothing-of-that-name")
    assert result.exit_code == 2
    assert "There is no model 'org/nothing-of-that-name', here or on the Hub." in result.stderr


def test_verify_tells_a_changed_output_by_its_exit_code(here):
    assert call("merge", recipe(), "out").exit_code == 0
    result = call("verify", "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("out is whole: 3 tensors in ")
    told = json.loads(call("verify", "out", "--json").stdout)
    assert told["ok"] is True
    assert told["tensors"] == 3
    weights = bytearray(Path("out/model.safetensors").read_bytes())
    weights[-1] ^= 1
    Path("out/model.safetensors").write_bytes(weights)
    result = call("verify", "out")
    assert result.exit_code == 1
    assert "model.safetensors was changed after it was written" in result.stdout
    result = call("verify", "out", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False


def test_methods(here):
    listed = call("methods").stdout
    for name in method_names():
        assert f" {name} " in listed
    about = call("methods", "ties").stdout
    assert "Yadav et al." in about
    assert "base_model: required" in about
    assert "in Python: ties(models, k=0.1, " in about
    rows = [line.split("  ") for line in about.splitlines() if line.startswith("  ")]
    table = {row[1].strip(): " ".join(row[2:]).strip() for row in rows}
    assert table["weight"].startswith("a number, one for each model")
    assert table["weight"].endswith("required")
    assert table["density"].startswith("a number, 0 to 1, one for each model")
    assert table["over"].startswith("tensor or model")
    Path("mine.py").write_text(
        "def median(models, *, share: float = 0.5, **kw):\n    '''Mine. And more.'''\n"
    )
    assert "Mine. And more." in call("methods", "mine.py:median").stdout


def test_version():
    assert call("--version").stdout.startswith("distmerge")


def test_terminal_width_does_not_cut_names_in_pipes(here):
    long = "model.layers.0." + "very." * 20 + "weight"
    make_model(here / "long", 7, {long: (2, 2)})
    assert long in call("inspect", "long", "--keys").stdout
