"""Tokenizers that lie, and rules for tokens that mean nothing: one clear error before anything is
allocated."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from vocabulary.models import TEXTS, save, tokenizer

from distmerge.errors import CheckpointError, DistmergeError, RecipeError
from distmerge.expressions.recipe import load_recipe
from distmerge.run.merge import plan


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [
        save(folder / "prose", tokenizer(TEXTS["prose"], 290), 1),
        save(folder / "law", tokenizer(TEXTS["law"], 300), 2),
    ]


def recipe(models: list[str], **fields: Any) -> str:
    parameters = {"weight": 0.5}
    return json.dumps(
        {"merge_method": "linear", "models": models, "parameters": parameters, **fields}
    )


def changed(place: str, folder: Path, **files: str) -> str:
    """A copy of a model, some of its files with other content."""
    shutil.copytree(place, folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)
    return str(folder)


@pytest.mark.parametrize("identity", [2**31, 100_000])
def test_an_id_far_beyond_the_embeddings_is_refused(places, tmp_path, identity):
    held = json.loads(Path(places[0], "tokenizer.json").read_text())
    held["model"]["vocab"]["far"] = identity
    odd = changed(places[0], tmp_path / "odd", tokenizer=json.dumps(held))
    tracemalloc.start()
    with pytest.raises(RecipeError, match=f"odd gives 'far' the id {identity:,}"):
        plan(recipe([odd, places[1]], tokenizer_source="union"))
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_ids_with_gaps_are_fine(places, tmp_path):
    held = json.loads(Path(places[0], "tokenizer.json").read_text())
    held["model"]["vocab"]["far"] = 5_000
    odd = changed(places[0], tmp_path / "odd", tokenizer=json.dumps(held))
    request = load_recipe(recipe([odd, places[1]], tokenizer_source="union")).request()
    assert request.donor.checkpoint.config["vocab_size"] == 5_001


ODD = [
    ("tokenizer", "null"),
    ("tokenizer", "[]"),
    ("tokenizer", "{"),
    ("tokenizer", '{"model": 3}'),
    ("tokenizer", "[" * 100_000),
    ("tokenizer_config", "null"),
    ("tokenizer_config", '{"tokenizer_class": 5}'),
    ("tokenizer_config", '{"added_tokens_decoder": 5}'),
    ("tokenizer_config", '{"added_tokens_decoder": {"x": 3}}'),
    ("tokenizer_config", '{"unk_token": "\\ud800"}'),
    ("generation_config", "null"),
    ("generation_config", "{"),
]


@pytest.mark.parametrize(("name", "content"), ODD)
def test_files_of_odd_forms_are_refused_by_the_models_name(places, tmp_path, name, content):
    odd = changed(places[0], tmp_path / "odd", **{name: content})
    with pytest.raises(DistmergeError, match="odd"):
        plan(recipe([odd, places[1]], tokenizer={"source": places[1]}))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": "\\ud800"}'])
def test_so_they_are_where_a_chat_template_is_asked_for(places, tmp_path, content):
    odd = changed(places[0], tmp_path / "odd", tokenizer_config=content)
    with pytest.raises(RecipeError, match=r"tokenizer_config\.json of .*odd"):
        plan(recipe([odd, places[1]], chat_template="chatml"))


def test_half_a_character_in_a_config_is_found_before_any_tensor_is_read(places, tmp_path):
    odd = changed(places[0], tmp_path / "odd", config='{"vocab_size": 290, "a": ["\\ud800"]}')
    with pytest.raises(CheckpointError, match=r"config\.json is not valid Unicode") as refused:
        plan(recipe([odd, places[1]]))
    assert str(odd) in str(refused.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"kind": "model_token", "model": "a", "token_id": -1}, r"source\.token_id.*not -1"),
        ({"kind": "model_token", "model": "a"}, "one of token and token_id"),
        ({"kind": "zeros", "model": "a"}, "kind is zero or model_token"),
        ({"kind": ["zero"]}, "kind is zero or model_token"),
        (3, "source"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(source, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(recipe(["a", "b"], tokenizer={"tokens": {"x": {"source": source}}}))
