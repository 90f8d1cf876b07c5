"""Models of which some tie their head to the embeddings: merged as mergekit 0.1.5 merges them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from parity.families import llama, off_by
from parity.oracle import Job, mergekit_merges
from safetensors.torch import load_file

import distmerge

pytestmark = [pytest.mark.full, pytest.mark.timeout(3000)]
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
NAMES = ("tied", "tied_too", "own", "own_too")
CASES = {
    "a tied one first": ("linear", ("tied", "own"), None),
    "a tied one last": ("linear", ("own", "tied"), None),
    "two tied ones first": ("linear", ("tied", "tied_too", "own"), None),
    "a tied base": ("task_arithmetic", ("own", "tied_too"), "tied"),
    "a base with a head": ("task_arithmetic", ("tied", "own_too"), "own"),
    "a tied base, sparse": ("ties", ("own", "own_too"), "tied"),
    "between a tied one and another": ("slerp", ("own",), "tied"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        llama(tied=name.startswith("tied")).save_pretrained(folder / name)
    return folder


def job(name: str, places: Path) -> Job:
    method, models, base = CASES[name]
    weighted = {"parameters": {"weight": 0.6}} if method != "slerp" else {}
    listed = [{"model": str(places / model), **weighted} for model in models]
    recipe = {"merge_method": method, "models": listed, "dtype": "float32"}
    if base is not None:
        recipe["base_model"] = str(places / base)
    if method == "slerp":
        recipe["parameters"] = {"t": 0.3}
    return Job(name, recipe)


@pytest.fixture(scope="module")
def theirs(places, tmp_path_factory):
    jobs = [job(name, places) for name in CASES]
    return mergekit_merges(jobs, tmp_path_factory.mktemp("mergekit"))


@pytest.mark.parametrize("name", CASES)
def test_the_same_head(name, places, theirs, tmp_path):
    expected = theirs[name]
    assert not isinstance(expected, str), expected
    distmerge.merge(job(name, places).text, str(tmp_path / "out"))
    found = load_file(tmp_path / "out/model.safetensors")
    assert max(off_by(found, expected).values()) <= 1e-5
    assert not torch.equal(found[HEAD], found[EMBED])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, found[HEAD])
