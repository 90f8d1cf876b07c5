"""Models of different vocabularies: each token has the embedding that mergekit 0.1.5 gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity.oracle import Job, mergekit_merges
from safetensors.torch import load_file
from tokenizers import AddedToken
from vocabulary.models import TEXTS, save, tokenizer, vocabulary

import distmerge

pytestmark = [pytest.mark.full, pytest.mark.timeout(3000)]
TURN = AddedToken("<|turn|>", special=True)
WEIGHTS = {"prose": 1 / 2, "law": 1 / 3, "code": 1 / 6}
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
OF_CODE = {"kind": "model_token", "model": "code"}
TOKENS: dict[str, Any] = {
    "<|turn|>": {"source": "code"},
    "Ġthe": {"source": "law", "force": True},
    "<new>": {"source": {**OF_CODE, "token": "<tool>"}},
    "<number>": {"source": {**OF_CODE, "token_id": 7}},
    "<nothing>": {"source": {"kind": "zero"}, "force": True},
}
SECTIONS: dict[str, dict[str, Any]] = {
    "union": {"source": "union"},
    "base": {"source": "base"},
    "another model": {"source": "law"},
    "by token": {"source": "union", "tokens": TOKENS},
    "padded": {"source": "union", "pad_to_multiple_of": 64},
    "padded, ties": {"source": "union", "pad_to_multiple_of": 64},
    "tied": {"source": "union"},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    added: dict[str, list[Any]] = {"prose": [], "law": [TURN], "code": ["<tool>", "<|turn|>"]}
    made = {
        name: save(folder / name, tokenizer(TEXTS[name], 290 + 10 * i, added[name]), i)
        for i, name in enumerate(WEIGHTS)
    }
    made["tied"] = save(folder / "tied", tokenizer(TEXTS["code"], 300), 7, tied=True)
    return made


def job(name: str, places: dict[str, str]) -> Job:
    """The recipe with the models' places for their names."""

    def placed(given: Any) -> Any:
        if isinstance(given, dict):
            return {key: placed(value) for key, value in given.items()}
        return places.get(given, given) if isinstance(given, str) else given

    weights = {**WEIGHTS, **({"tied": 1.0} if name == "tied" else {})}
    listed = [{"model": places[n], "parameters": {"weight": w}} for n, w in weights.items()]
    recipe: dict[str, Any] = {"merge_method": "linear", "models": listed}
    if name.endswith("ties"):
        recipe |= {"merge_method": "ties", "parameters": {"density": 0.6}}
    recipe["base_model"] = places["tied" if name == "tied" else "prose"]
    return Job(name, {**recipe, "dtype": "float32", "tokenizer": placed(SECTIONS[name])})


@pytest.fixture(scope="module")
def theirs(places, tmp_path_factory):
    """By the section's name: their tensors, and where they lie."""
    place = tmp_path_factory.mktemp("mergekit")
    merged = mergekit_merges([job(name, places) for name in SECTIONS], place)
    return {name: (merged[name], place / f"{i:04}") for i, name in enumerate(SECTIONS)}


@pytest.mark.parametrize("name", SECTIONS)
def test_every_token_has_the_same_embedding(name, places, theirs, tmp_path: Path):
    expected, place = theirs[name]
    assert not isinstance(expected, str), expected
    distmerge.merge(job(name, places).text, str(tmp_path / "out"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    ours, own = vocabulary(tmp_path / "out"), vocabulary(place)
    assert ours.keys() == own.keys()
    rows, same = list(ours.values()), [own[token] for token in ours]
    for key, tensor in expected.items():
        assert found[key].shape == tensor.shape
        if key in EMBEDDINGS:
            torch.testing.assert_close(found[key][rows], tensor[same])
            behind = len(ours)
            torch.testing.assert_close(found[key][behind:], tensor[behind:])
        else:
            torch.testing.assert_close(found[key], tensor)
