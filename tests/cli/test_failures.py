"""What a person at a shell sees when something is wrong: one sentence, its facts, a fix."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from cli.commands import REPOSITORY, call, recipe, start

from distmerge.cli.failures import reported, to_the_end

TIES = {"merge_method": "ties", "base_model": "base"}
A, B = ({"model": name, "parameters": {"weight": 1}} for name in "ab")


@pytest.mark.parametrize(
    ("changes", "arguments", "headline", "fix"),
    [
        (
            {"models": [A, {"model": "./nope"}]},
            [],
            "There is no file or directory './nope'.",
            "path",
        ),
        ({"models": [A, {**B, "model": "empty"}]}, [], "empty", "Fix: "),
        (
            {"models": [A, {**B, "model": "sharded"}]},
            [],
            "1 of the 1 files that model.safet",
            "Fix: ",
        ),
        ({"models": [A, {**B, "model": "cut"}]}, [], "model.safetensors", "Fix: "),
        (
            {"models": [A, {**B, "model": "wider"}]},
            [],
            "Models disagree on the shape of 1",
            "Fix: ",
        ),
        ({"models": [A, {**B, "model": "fewer"}]}, [], "Models disagree on 2 keys.", "on_missing"),
        ({"models": [A, A]}, [], "a is listed twice among the models.", "list it once"),
        ({"merge_method": "tiess"}, [], "There is no merge method 'tiess'.", "'ties'?"),
        (
            {"parameters": {"normalise": 1}},
            ["--strict"],
            "merge.yml has keys without effect.",
            "--strict",
        ),
        (
            {},
            ["--set", "parameters.normalise=1"],
            "linear has no parameter 'normalise'.",
            "write 'normalize'",
        ),
        ({**TIES, "parameters": {"density": 2}}, [], "ties: density can't be 2.", "density: "),
        ({**TIES, "base_model": None}, [], "ties needs a base_model.", "base_model: "),
        (
            {"merge_method": "slerp", "models": ["a", "b", "base"], "parameters": {"t": 0.5}},
            [],
            "slerp merges 2 models, not 3.",
            "choose another merge_method",
        ),
        (
            {"models": [], "slices": [{}]},
            [],
            "merge.yml, line 1: slices.0.sources: it is missing",
            "sources: [{model",
        ),
        ({"dtype": "float8_e4m3fn"}, [], "dtype: A merge can't be written in dtype", "bfloat16"),
        ({"dype": "float16"}, ["--strict"], "merge.yml has keys without effect.", "--strict"),
        ({}, ["--set", "sed=3"], "--set sed: 'sed' is ignored here; write 'seed'.", "write 'seed'"),
        ({}, ["--set", "seed"], "--set 'seed' is not of the form key=value.", "--set parameters."),
        ({}, ["--set", "models.7.model=c"], "--set models.7.model leads nowhere", "models.0"),
        ({}, ["--out-dtype", "int8"], "A merge can't be written in dtype 'int8'.", "bfloat16"),
        ({}, ["--allowed-mem", "lots"], "'lots' is not a size.", "write 2GiB"),
        ({}, ["--max-shard-size", "-1"], "'-1' is not a size.", "write 2GiB"),
        ({}, ["--allowed-mem", "1MiB"], "", "--allowed-mem"),
    ],
)
def test_bad_input_is_one_clear_error_before_anything_is_written(
    here, changes, arguments, headline, fix
):
    for command in (["plan"], ["merge"]):
        result = call(*command, recipe(**changes), "out", *arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        lines = [line for line in result.stderr.splitlines() if not line.startswith("Warning: ")]
        assert headline in lines[0]
        assert sum(line.startswith("Fix: ") for line in lines) == 1
        assert lines[-1].startswith("Fix: ")
        assert fix in lines[-1]
        assert all(line.startswith("  ") for line in lines[1:-1])
        assert "Traceback" not in result.stderr
        assert not Path("out").exists()


@pytest.mark.parametrize(
    ("content", "headline"),
    [
        (None, "There is no recipe 'merge.yml'."),
        (b"merge_method: linear\nmodels: [a,\n b\nseed: 1\n", "merge.yml, line 4, column 5: "),
        (b"merge_method: linear\n\tmodels: []\n", "merge.yml, line 2, column 1: this is not YAML."),
        (b"\x93NUMPY\x01", "merge.yml is not text."),
        (b"- a\n", "merge.yml holds a list, and a recipe is a mapping of keys to values."),
        (b"", "merge.yml holds nothing, and a recipe is a mapping of keys to values."),
    ],
)
def test_what_is_no_recipe(here, content, headline):
    if content is not None:
        Path("merge.yml").write_bytes(content)
    result = call("merge", "merge.yml", "out")
    assert result.exit_code == 2
    assert headline in result.stderr.splitlines()[0]
    assert result.stderr.splitlines()[-1].startswith("Fix: ")


@pytest.mark.parametrize("command", [["plan"], ["sweep"]])
def test_a_recipe_of_a_user_that_is_not_there(here, command):
    result = call(*command, "~nobody-of-that-name/merge.yml", "out")
    assert result.exit_code == 2
    assert "There is no recipe '~nobody-of-that-name/merge.yml'." in result.stderr


@pytest.mark.parametrize("command", ["merge", "plan", "sweep"])
def test_a_recipes_name_that_is_too_long(here, command):
    result = call(command, "x" * 300, "out")
    assert result.exit_code == 2
    assert "can't be read" in result.stderr.splitlines()[0]


@pytest.mark.parametrize("command", ["merge", "plan", "sweep", "search"])
def test_an_output_in_this_process_memory_is_refused(here, command):
    result = call(command, recipe(), "memory://out")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0].startswith("memory://out is in the memory of this")
    result = call("merge", recipe(), "out", "--keep-intermediates", "memory://kept")
    assert result.exit_code == 2
    assert not Path("out").exists()


def test_a_folder_that_was_deleted_is_one_sentence(here):
    path = Path(recipe()).absolute()
    Path("gone").mkdir()
    os.chdir("gone")
    os.rmdir("../gone")
    result = call("merge", path, here / "out")
    assert result.exit_code == 2
    assert result.stderr == (
        "The folder that this command is run in was deleted.\nFix: cd to one that is there\n"
    )


def test_usage_mistakes_are_told_by_the_parser(here):
    for arguments in (["mrege"], ["merge", "x.yml"], ["plan", "x.yml", "--engine", "spark"]):
        result = call(*arguments)
        assert result.exit_code == 2
        assert "Usage: " in result.stderr


def test_other_exceptions_are_one_line_that_asks_for_trace(here, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("distmerge.checkpoints.opening.open_checkpoint", broken)
    result = call("inspect", "a")
    assert result.exit_code == 1
    fix = "Fix: --trace shows where it was raised"
    assert result.stderr.splitlines() == ["ZeroDivisionError: first line", fix]
    result = call("inspect", "a", "--trace")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "in broken" in result.stderr


def test_our_errors_show_a_trace_only_when_asked(here):
    assert "Traceback" not in call("inspect", "empty").stderr
    result = call("inspect", "empty", "--trace")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Fix: ")


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_is_one_line(here, times):
    thread = "threading.Thread(target=time.sleep, args=(100,)).start()" if times == 2 else ""
    Path("slow.py").write_text(
        f"import pathlib, threading, time\n{thread}\n"
        "pathlib.Path('started').touch()\ntime.sleep(100)\n"
    )
    process = start("plan", recipe(merge_method="slow.py:merge"))
    deadline = time.monotonic() + 60
    while not Path("started").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told = process.stderr.readline()
    if times == 2:
        time.sleep(0.2)  # it waits for the thread by now
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told == "Interrupted. The same command goes on from what is finished.\n"
    assert (out, err) == ("", "")


def test_a_closed_pipe_is_no_error(here):
    command = f"{sys.executable} -m distmerge.cli inspect a --keys | head -c 1"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = ["bash", "-o", "pipefail", "-c", command]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""


def test_a_long_name_is_cut_in_a_warning_and_in_an_error(here):
    long = "n" * 30_000
    warned, failed = call("plan", recipe(passthrough=[long])), call("plan", long)
    assert (warned.exit_code, failed.exit_code) == (0, 2), failed.output
    for result in (warned, failed):
        assert "nnn" in result.stderr
        assert max(map(len, result.stderr.splitlines())) < 1100


def test_another_full_disk_is_not_standard_outputs(capfd, tmp_path):
    def write() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "spool"))

    with pytest.raises(typer.Exit) as ended, to_the_end():
        reported(write)()
    told = capfd.readouterr().err
    assert ended.value.exit_code == 2
    assert told.startswith("No room is left on a disk that was written to: ")
    assert str(tmp_path / "spool") in told
    assert told.splitlines()[-1].startswith("Fix: ")


@pytest.mark.parametrize(
    ("command", "code"),
    [("inspect a > /dev/full", 2), ("--version > /dev/full", 2), ("inspect a >&-", 0)],
)
def test_output_that_goes_nowhere(here, command, code):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = ["bash", "-c", f"{sys.executable} -m distmerge {command}"]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60)
    told = "Standard output can't be written: No space left on device."
    assert result.returncode == code
    assert result.stderr.splitlines()[:1] == ([told] if code else [])
    assert "Traceback" not in result.stderr
