"""Merges of models with different vocabularies, against the same in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from run.family import names_below, tensors_at
from tokenizers import AddedToken
from vocabulary.models import TEXTS, aligned, save, tokenizer, vocabulary

import distmerge
from distmerge.errors import CheckpointNotFound, RecipeError, ShapeMismatch
from distmerge.expressions.recipe import load_recipe
from distmerge.plan.explain import to_json
from distmerge.run.merge import plan

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TURN = AddedToken("<|turn|>", special=True)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "prose": save(folder / "prose", tokenizer(TEXTS["prose"], 290), 1),
        "law": save(folder / "law", tokenizer(TEXTS["law"], 300, [TURN], eos_token="<|turn|>"), 2),
        "code": save(folder / "code", tokenizer(TEXTS["code"], 310, ["<tool>", "<|turn|>"]), 3),
    }


@pytest.fixture(scope="module")
def models(places: dict[str, str]) -> SimpleNamespace:
    return SimpleNamespace(
        places=places,
        tensors={name: tensors_at(place) for name, place in places.items()},
        ids={name: vocabulary(place) for name, place in places.items()},
    )


def recipe(places: dict[str, str], **fields: Any) -> str:
    """Half of prose, a third of law, a sixth of code."""
    weights = {"prose": 1 / 2, "law": 1 / 3, "code": 1 / 6}
    listed = [{"model": places[n], "parameters": {"weight": w}} for n, w in weights.items()]
    fields = {"base_model": places["prose"], **fields}
    return json.dumps({"merge_method": "linear", "models": listed, "dtype": "float32", **fields})


def check(models: SimpleNamespace, out: Path, rules: Any = None, multiple: int = 1) -> None:
    """The output's embeddings, and that it loads as its config says."""
    written, ids = tensors_at(out), vocabulary(out)
    names = list(models.places)
    for key in (EMBED, HEAD):
        held = [models.tensors[name][key] for name in names]
        given = {token: (row(key), force) for token, (row, force) in (rules or {}).items()}
        expected = aligned(held, [models.ids[n] for n in names], ids, given, multiple)
        merged = expected[0] / 2 + expected[1] / 3 + expected[2] / 6
        torch.testing.assert_close(written[key], merged)
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == len(written[EMBED])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded.get_input_embeddings().weight, written[EMBED])


@pytest.mark.parametrize(
    "asked", [{"tokenizer_source": "union"}, {"tokenizer": {}}, {"tokenizer": {"source": "union"}}]
)
def test_a_union_has_every_token_of_every_model(models, tmp_path, asked):
    out = tmp_path / "out"
    distmerge.merge(recipe(models.places, **asked), str(out))
    check(models, out)
    ids = vocabulary(out)
    assert set(ids) == {token for own in models.ids.values() for token in own}
    assert {token: ids[token] for token in models.ids["prose"]} == models.ids["prose"]
    words = transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS.values():
        assert words.decode(words(text)["input_ids"]) == text
    turn = words.convert_tokens_to_ids("<|turn|>")
    assert words("the cat<|turn|>")["input_ids"][-1] == turn
    assert "<|turn|>" not in words.decode([turn], skip_special_tokens=True)
    assert (words.bos_token, words.eos_token) == ("<s>", "</s>")


def test_the_bases_vocabulary(models, tmp_path):
    out = tmp_path / "out"
    distmerge.merge(recipe(models.places, tokenizer_source="base"), str(out))
    check(models, out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == Path(models.places["prose"], name).read_bytes()


def test_another_models_vocabulary_brings_its_special_tokens(models, tmp_path):
    out, source = tmp_path / "out", models.places["law"]
    Path(models.places["prose"], "merges.txt").write_text("of the base's tokenizer\n")
    distmerge.merge(recipe(models.places, tokenizer={"source": source}), str(out))
    check(models, out)
    assert vocabulary(out) == models.ids["law"]
    assert "merges.txt" not in names_below(out)
    turn = models.ids["law"]["<|turn|>"]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == turn
    Path(models.places["prose"], "merges.txt").unlink()


def test_differing_vocabularies_are_refused_with_the_remedy(models):
    with pytest.raises(ShapeMismatch) as refused:
        plan(recipe(models.places))
    assert "tokenizer: {source: union}" in (refused.value.fix or "")


def test_embeddings_by_token_and_padding(models, tmp_path):
    out, places, ids = tmp_path / "out", models.places, models.ids
    model_token = {"kind": "model_token", "model": places["code"]}
    tokens = {
        "<|turn|>": {"source": places["code"]},
        "Ġthe": {"source": places["law"], "force": True},
        "<new>": {"source": {**model_token, "token": "<tool>"}},
        "<number>": {"source": {**model_token, "token_id": 7}},
        "<nothing>": {"source": {"kind": "zero"}, "force": True},
    }
    fields = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 64}
    distmerge.merge(recipe(places, tokenizer=fields), str(out))
    rules = {
        "<|turn|>": (lambda key: models.tensors["code"][key][ids["code"]["<|turn|>"]], False),
        "Ġthe": (lambda key: models.tensors["law"][key][ids["law"]["Ġthe"]], True),
        "<new>": (lambda key: models.tensors["code"][key][ids["code"]["<tool>"]], False),
        "<number>": (lambda key: models.tensors["code"][key][7], False),
        "<nothing>": (lambda key: torch.zeros(8), True),
    }
    check(models, out, rules, 64)
    words = transformers.AutoTokenizer.from_pretrained(out)
    new = words.convert_tokens_to_ids("<new>")
    assert words("the cat<new>")["input_ids"][-1] == new


@pytest.mark.parametrize("first", ["tied", "law"])
def test_a_tied_model_takes_rows_of_heads_for_its_head(models, tmp_path, first):
    words = tokenizer(TEXTS["code"], 300)
    places = {"tied": save(tmp_path / "tied", words, 7, tied=True), "law": models.places["law"]}
    listed = [{"model": place, "parameters": {"weight": 0.5}} for place in places.values()]
    fields = {"models": listed, "base_model": places[first], "tokenizer": {"source": "union"}}
    distmerge.merge({"merge_method": "linear", "dtype": "float32", **fields}, str(tmp_path / "out"))
    written, ids = tensors_at(tmp_path / "out"), vocabulary(tmp_path / "out")
    names = sorted(places, key=first.__ne__)
    tensors = {"law": models.tensors["law"], "tied": tensors_at(places["tied"])}
    tensors["tied"][HEAD] = tensors["tied"][EMBED]
    own = {"law": models.ids["law"], "tied": vocabulary(places["tied"])}
    for key in (EMBED, HEAD):
        found = aligned([tensors[n][key] for n in names], [own[n] for n in names], ids)
        torch.testing.assert_close(written[key], (found[0] + found[1]) / 2)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_explain_tells_of_padding(models):
    asked = {"source": "union", "pad_to_multiple_of": 64}
    told = to_json(plan(recipe(models.places, tokenizer=asked)), EMBED)["tensors"][EMBED]
    assert told["from"]["method"] == "linear"
    made = [one["made"] for one in told["from"]["of"]]
    assert len(made) == 3
    assert all(text.endswith("padded with the mean of its rows") for text in made)


def test_tokens_that_no_model_has_begin_at_zero_with_a_warning(tmp_path):
    words = tokenizer(TEXTS["prose"], 290, ["<late>"])
    base = save(tmp_path / "base", words, 1, rows=len(words) - 1)
    asked = {"merge_method": "passthrough", "models": [base], "tokenizer_source": "base"}
    request = load_recipe(asked).request()
    assert request.warnings[-1] == "No model has an embedding of '<late>': zeros are taken."
    distmerge.merge(request, str(tmp_path / "out"))
    written, own = tensors_at(tmp_path / "out"), tensors_at(base)
    assert torch.equal(written[EMBED], torch.cat([own[EMBED], torch.zeros(1, 8)]))


def test_a_tied_head_is_one_matrix(tmp_path):
    first = save(tmp_path / "a", tokenizer(TEXTS["prose"], 290), 1, tied=True)
    second = save(tmp_path / "b", tokenizer(TEXTS["law"], 290), 2, tied=True)
    listed = [{"model": place, "parameters": {"weight": 0.5}} for place in (first, second)]
    asked = {"merge_method": "linear", "models": listed, "tokenizer": {}}
    distmerge.merge(asked, str(tmp_path / "out"))
    written = tensors_at(tmp_path / "out")
    assert HEAD not in written
    held, ids = (
        [tensors_at(place)[EMBED] for place in (first, second)],
        vocabulary(tmp_path / "out"),
    )
    expected = aligned(held, [vocabulary(first), vocabulary(second)], ids)
    torch.testing.assert_close(written[EMBED], (expected[0] + expected[1]) / 2)


@pytest.mark.parametrize(
    ("fields", "headline"),
    [
        ({"tokens": {"<s>": {"source": "NOWHERE"}}}, "isn't merged"),
        ({"tokens": {"Ġcat": {"source": "LAW"}}}, "has no embedding of 'Ġcat'"),
        (
            {"tokens": {"x": {"source": {"kind": "model_token", "model": "LAW", "token_id": 999}}}},
            "has no embedding of 999",
        ),
    ],
)
def test_embeddings_that_are_not_there_are_refused(models, tmp_path, fields, headline):
    save(tmp_path / "other", tokenizer(TEXTS["code"], 280), 9)
    text = json.dumps(fields).replace("LAW", models.places["law"])
    fields = json.loads(text.replace("NOWHERE", str(tmp_path / "other")))
    with pytest.raises(RecipeError, match=headline):
        plan(recipe(models.places, tokenizer=fields))


MISSPELT = {
    "lw": ({"source": "lw"}, "there is no 'lw'", "'law'"),
    "path": ({"source": "./lax"}, "there is no './lax'", "'./law'"),
    "unoin": ({"source": "unoin"}, "there is no 'unoin'", "'union'"),
    "token": ({"tokens": {"Ġthe": {"source": "cod"}}}, "there is no 'cod'", "'code'"),
    "other token": (
        {"tokens": {"x": {"source": {"kind": "model_token", "model": "lw", "token_id": 7}}}},
        "there is no 'lw'",
        "'law'",
    ),
}


@pytest.mark.parametrize("case", MISSPELT)
def test_a_name_that_is_nearly_a_models_is_not_looked_for_on_the_hub(models, monkeypatch, case):
    section, headline, fix = MISSPELT[case]
    monkeypatch.chdir(Path(models.places["law"]).parent)
    dot = "./" if case == "path" else ""
    text = recipe({name: dot + name for name in models.places}, tokenizer=section)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(RecipeError) as refused:
        load_recipe(text).request()
    assert headline in refused.value.headline
    assert "line 1" in refused.value.headline
    assert f"did you mean {fix}?" in (refused.value.fix or "")


def test_a_path_that_is_nearly_a_models_is_not_looked_for_on_the_hub(models, monkeypatch):
    folder = Path(models.places["law"]).parent
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    places = {name: f"{folder.name}/{name}" for name in models.places}
    text = recipe(places, tokenizer_source=f"{folder.name}/lax")
    with pytest.raises(RecipeError, match=f"there is no '{folder.name}/lax'") as refused:
        load_recipe(text).request()
    assert f"did you mean '{folder.name}/law'?" in (refused.value.fix or "")


def test_a_name_on_the_hub_that_is_nearly_a_models_is_explained(hub, models):
    for name, place in models.places.items():
        hub.add_repo(f"words/{name}", Path(place))
    names = {name: f"words/{name}" for name in models.places}
    for section in ({"source": "words/lwa"}, {"tokens": {"Ġthe": {"source": "words/lwa"}}}):
        with pytest.raises(CheckpointNotFound, match="hf://words/lwa") as refused:
            load_recipe(recipe(names, tokenizer=section)).request()
        assert "did you mean 'words/law'? Else: check the spelling" in (refused.value.fix or "")
        assert any("line 1" in fact for fact in refused.value.facts)
    hub.add_repo("words/lwa", Path(models.places["law"]))  # now there is such a model
    assert load_recipe(recipe(names, tokenizer_source="words/lwa")).request().tokenizer


def test_names_in_a_formula_are_offered_too(models):
    formula = {
        "models": {"law": models.places["law"], "prose": models.places["prose"]},
        "merge": "0.5 * law + 0.5 * prose",
    }
    with pytest.raises(RecipeError, match="no 'lw', here or among the models") as refused:
        load_recipe({**formula, "tokenizer_source": "lw"}).request()
    assert "did you mean 'law'?" in (refused.value.fix or "")
    assert load_recipe({**formula, "tokenizer_source": "law"}).request().tokenizer


def test_a_model_without_a_tokenizer_is_refused(models, tmp_path):
    place = save(tmp_path / "bare", tokenizer(TEXTS["code"], 280), 9)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    asked = recipe({**models.places, "law": place}, tokenizer_source="union")
    with pytest.raises(RecipeError, match="bare has no tokenizer"):
        plan(asked)


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"tokenizer": {"sources": "base"}}, "'sources' is ignored here; write 'source'."),
        ({"tokenizer": {"tokens": {"a": {"source": "b", "forced": 1}}}}, "write 'force'."),
    ],
)
def test_keys_without_effect_are_told(fields, warning):
    found = load_recipe({"merge_method": "linear", "models": ["b"], **fields}).warnings
    assert len(found) == 1
    assert found[0].endswith(warning)


def test_a_vocabulary_is_said_once():
    with pytest.raises(RecipeError, match="there is a 'tokenizer:' too"):
        load_recipe(
            {"merge_method": "linear", "models": ["b"], "tokenizer": {}, "tokenizer_source": "base"}
        )
