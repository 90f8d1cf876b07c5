"""The token that `hf auth login` has stored is enough to read from the Hub and to write to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from run.family import MODELS, Family, names_below, weight_bytes

import distmerge

pytestmark = pytest.mark.full


@pytest.fixture
def login(tmp_path):
    """Gives the environment of someone who has logged in, in a home of their own."""

    def log_in(token: str) -> dict[str, str]:
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
        environment.pop("HF_TOKEN", None)
        hf = Path(sys.executable).with_name("hf")
        command = [hf, "auth", "login", "--token", token]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return environment

    return log_in


@pytest.fixture
def private(hub, family: Family) -> Iterator[list[str]]:
    """Two private models on the Hub."""
    names = [f"org/{name}-{uuid.uuid4().hex[:8]}" for name in MODELS[1:3]]
    for name, model in zip(names, MODELS[1:3], strict=True):
        hub.add_repo(name, family.path(model), private=True)
    yield names
    for name in names:
        hub.remove_repo(name)


def command(names: list[str], out: str, folder: Path, environment: dict[str, str], *more: str):
    models = [{"model": name} for name in names]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}}
    (folder / "recipe.yml").write_text(json.dumps(recipe))
    words = [sys.executable, "-m", "distmerge.cli", "merge", "recipe.yml", out, *more]
    return subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True)


def test_it_reads_private_models_and_writes_one(hub, family, private, login, tmp_path):
    out = f"org/merged-{uuid.uuid4().hex[:8]}"
    ran = command(private, f"hf://{out}", tmp_path, login(hub.token))
    assert ran.returncode == 0, ran.stderr
    plain = tmp_path / "plain"
    models = [{"model": family.path(name)} for name in MODELS[1:3]]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}}
    distmerge.merge(recipe, str(plain))
    found = hub.files(out)
    found.pop(".gitattributes", None)
    assert set(found) == names_below(plain)
    for name, data in weight_bytes(plain).items():
        assert found[name] == data
    text = ran.stdout + ran.stderr + found["README.md"].decode() + found["distmerge.json"].decode()
    assert hub.token not in text
    hub.remove_repo(out)


def test_workers_on_ray_find_it_too(hub, private, login, tmp_path):
    more = ["--engine", "ray", "--workers", "1"]
    ran = command(private, "merged", tmp_path, login("hf_read_token"), *more)
    assert ran.returncode == 0, ran.stderr
    assert "hf_read_token" not in ran.stdout + ran.stderr


def test_a_login_that_may_not_is_one_sentence(hub, private, login, tmp_path):
    ran = command(private, "merged", tmp_path, login("hf_stranger_token"))
    assert ran.returncode != 0
    assert any(f"There is no model '{name}'" in ran.stderr for name in private)  # as the Hub says
    assert "Traceback" not in ran.stderr
    assert "hf_stranger_token" not in ran.stderr
