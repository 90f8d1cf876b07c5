"""Secrets that a merge is given are in nothing that it prints, writes or shows to others."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from run.family import save_model
from run.merging import SMALL, small_models

import distmerge
from distmerge.errors import AccessDenied, CheckpointNotFound, OutputError

UNUSED = "planted-secret-of-another-bucket"
WRONG = "planted-wrong-secret"
SESSION = "planted-session-token"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "planted-key-in-the-environment",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-in-the-environment",
    "AWS_SESSION_TOKEN": "planted-token-in-the-environment",
}
IN_URL = "planted-in-the-url"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("small")
    return [Path(save_model(m, folder / str(i))) for i, m in enumerate(small_models(2))]


@pytest.fixture
def sources(s3, hub, models) -> Iterator[list[str]]:
    """One model on S3, one private one on the Hub."""
    name = f"leak-{uuid.uuid4().hex[:8]}"
    for path in models[0].iterdir():
        key = f"{name}/model/{path.name}"
        s3.client().put_object(Bucket=s3.bucket, Key=key, Body=path.read_bytes())
    hub.add_repo(f"org/{name}", models[1], private=True)
    yield [s3.url(f"{name}/model"), f"hf://org/{name}"]
    hub.remove_repo(f"org/{name}")


def recipe_with_secrets(s3: Any, sources: list[str], folder: Path) -> Path:
    text = {
        "merge_method": "linear",
        "models": [{"model": source} for source in sources],
        "parameters": {"weight": 1.0},
        "storage_options": {
            f"s3://{s3.bucket}/": {**s3.storage_options, "token": SESSION},
            "s3://elsewhere/": {"key": UNUSED, "secret": UNUSED},
        },
    }
    path = folder / "recipe.yml"
    path.write_text(json.dumps(text))
    return path


def watched(command: list[str], environment: dict[str, str]) -> tuple[str, set[str]]:
    """All that a command prints, and the arguments of every process below it."""
    log = Path(environment["TMPDIR"], "printed")
    arguments: set[str] = set()
    with log.open("wb") as printed:
        process = subprocess.Popen(
            command, stdout=printed, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
        while process.poll() is None:
            arguments |= _arguments_below(process.pid)
            time.sleep(0.05)
    text = log.read_text()
    assert process.returncode == 0, text
    return text, arguments


def _arguments_below(pid: int) -> set[str]:
    found = set()
    try:
        top = psutil.Process(pid)
        for one in (top, *top.children(recursive=True)):
            found.add(" ".join(one.cmdline()))
    except psutil.Error:
        pass
    return found


def leaking(folder: Path, secrets: list[str], but: Path) -> list[str]:
    """Files below a folder that hold one of the secrets."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path != but:
            data = path.read_bytes()
            found += [f"{path}: {secret}" for secret in secrets if secret.encode() in data]
    return found


@pytest.mark.parametrize(
    ("engine", "out"),
    [
        ("local", "s3"),
        pytest.param("local", "hub", marks=pytest.mark.full),
        pytest.param("ray", "s3", marks=pytest.mark.full),
    ],
)
def test_secrets_stay_where_they_are_needed(s3, hub, sources, tmp_path, engine, out):
    path = recipe_with_secrets(s3, sources, tmp_path)
    secrets = [s3.access_key, s3.secret_key, hub.token, UNUSED, SESSION, *ENVIRONMENT.values()]
    name = f"leak-{uuid.uuid4().hex[:8]}"
    url = s3.url(name) if out == "s3" else f"hf://org/{name}"
    command = [sys.executable, "-m", "distmerge.cli", "merge", str(path), url]
    log = tmp_path / "events.jsonl"
    command += [
        "--event-log",
        str(log),
        "--max-shard-size",
        str(SMALL),
        "--json",
        "--engine",
        engine,
        "--workers",
        "1",
    ]
    space = tmp_path / "t"
    space.mkdir()
    # Ray keeps its sessions, with every log and what describes the job, in its own folder.
    environment = {"HF_TOKEN": hub.token, "TMPDIR": str(space), "RAY_TMPDIR": f"/tmp/{name[-6:]}"}
    environment |= ENVIRONMENT
    sessions = Path(environment["RAY_TMPDIR"])
    sessions.mkdir()
    try:
        printed, arguments = watched(command, environment)
        assert '"done"' in printed
        assert '"done"' in log.read_text()
        shown = {"printed": printed, "arguments": "\n".join(arguments)}
        assert not [k for k, text in shown.items() if any(s in text for s in secrets)]
        assert leaking(tmp_path, secrets, path) + leaking(sessions, secrets, path) == []
        assert engine == "local" or list(sessions.rglob("*.log"))
    finally:
        subprocess.run(["rm", "-rf", str(sessions)], check=True)
    written = _written(s3, hub, name, out)
    assert {"distmerge.json", "README.md", "mergekit_config.yml", "config.json"} <= set(written)
    assert not [n for n, data in written.items() if any(s.encode() in data for s in secrets)]


def _written(s3: Any, hub: Any, name: str, out: str) -> dict[str, bytes]:
    if out == "hub":
        found: dict[str, bytes] = hub.files(f"org/{name}")
        return found
    client = s3.client()
    return {
        key.removeprefix(f"{name}/"): client.get_object(Bucket=s3.bucket, Key=key)["Body"].read()
        for key in s3.keys(f"{name}/")
    }


@pytest.mark.parametrize("where", ["input", pytest.param("output", marks=pytest.mark.full)])
def test_a_url_with_credentials_is_refused_and_not_repeated(models, tmp_path, where):
    url = f"s3://user:{IN_URL}@bucket/model"
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(models[0])},
            {"model": url if where == "input" else str(models[1])},
        ],
        "parameters": {"weight": 1.0},
    }
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(recipe))
    out = url if where == "output" else str(tmp_path / "out")
    words = ["merge", str(path), out, "--event-log", str(tmp_path / "events.jsonl"), "--json"]
    told = subprocess.run(
        [sys.executable, "-m", "distmerge.cli", *words], capture_output=True, text=True, check=False
    )
    assert told.returncode == 2
    assert "credentials" in told.stderr
    assert "Fix: " in told.stderr
    assert IN_URL not in told.stdout + told.stderr
    assert leaking(tmp_path, [IN_URL], path) == []


@pytest.mark.parametrize(
    "where", ["an input on S3", "an output on S3", "an input on the Hub", "an output on the Hub"]
)
def test_wrong_credentials_are_one_sentence_and_not_in_it(
    s3, hub, sources, models, tmp_path, monkeypatch, caplog, where
):
    caplog.set_level(logging.DEBUG, "distmerge")
    monkeypatch.setenv("HF_TOKEN", WRONG)
    options = {"s3://": s3.storage_options | {"secret": WRONG}}
    place = {"an input on S3": sources[0], "an input on the Hub": sources[1]}.get(where)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(models[0])}, {"model": place or str(models[1])}],
        "parameters": {"weight": 1.0},
    }
    outputs = {"an output on S3": s3.url("wrong/out"), "an output on the Hub": "hf://org/wrong"}
    out = outputs.get(where, str(tmp_path / "out"))
    with pytest.raises((AccessDenied, CheckpointNotFound, OutputError)) as caught:
        distmerge.merge(recipe, out, storage_options=options)
    assert "Fix: " in str(caught.value)
    assert caught.value.headline.count(". ") == 0
    assert WRONG not in str(caught.value) + caplog.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("an input on S3", "There are no credentials for s3://"),
        ("an output on S3", "You may not write s3://"),
        ("an input on the Hub", "There is no public model hf://"),
        ("an output on the Hub", "You may not write hf://"),
    ],
)
def test_missing_credentials_are_one_sentence(s3, sources, models, tmp_path, where, told):
    options = {"s3://": {"client_kwargs": s3.storage_options["client_kwargs"]}}
    place = {"an input on S3": sources[0], "an input on the Hub": sources[1]}.get(where)
    outputs = {"an output on S3": s3.url("none/out"), "an output on the Hub": "hf://org/none"}
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(models[0])}, {"model": place or str(models[1])}],
        "parameters": {"weight": 1.0},
    }
    out = outputs.get(where, str(tmp_path / "out"))
    with pytest.raises((AccessDenied, CheckpointNotFound, OutputError), match=told) as caught:
        distmerge.merge(recipe, out, storage_options=options)
    assert caught.value.headline.count(". ") == 0
    assert "Fix: " in str(caught.value)


@pytest.mark.full
def test_options_from_fsspecs_own_environment_reach_the_merge(s3, sources, models, tmp_path):
    kwargs = s3.storage_options
    environment = {
        "FSSPEC_S3": json.dumps({"key": kwargs["key"], "secret": kwargs["secret"]}),
        "FSSPEC_S3_CLIENT_KWARGS": json.dumps(kwargs["client_kwargs"]),
        "TMPDIR": str(tmp_path),
    }
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(models[0])}, {"model": sources[0]}],
        "parameters": {"weight": 1.0},
    }
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(recipe))
    out = str(tmp_path / "out")
    printed, _ = watched(
        [sys.executable, "-m", "distmerge.cli", "merge", str(path), out], environment
    )
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert s3.secret_key not in printed
