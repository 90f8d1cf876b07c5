"""`chat_template:` of recipes, as transformers' own reader finds it in what was merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from run.family import names_below
from vocabulary.models import TEXTS, save, tokenizer

import distmerge
from distmerge.errors import RecipeError
from distmerge.expressions.chat_templates import FORMATS, check_template
from distmerge.expressions.recipe import load_recipe
from distmerge.run.merge import plan

ASKED = {"role": "user", "content": "Hi"}
CHAT = [ASKED, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "Bye"}]
TOLD = {"role": "system", "content": "Be kind"}
PLAIN = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
NOISY = "{% for m in messages %}{{ m['content'] | upper }}!{% endfor %}"

MEANT = {
    "alpaca": "### Instruction:\nHi\n\n### Response:\nYo</s>\n\n### Instruction:\nBye\n\n"
    "### Response:\n",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Yo[|endofturn|]\n[|user|]Bye\n"
    "[|assistant|]",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Hi [/INST] Yo</s>[INST] Bye [/INST]",
}
"""The conversation as whoever made the format prints it."""
BEGUN = {
    "alpaca": "Be kind\n\n### Instruction:\nHi\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n",
    "exaone": "[|system|]Be kind[|endofturn|]\n[|user|]Hi\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be kind\n\nHi [/INST]",
}
"""A question behind a system message."""


def model(folder: Path, seed: int, template: Any = None) -> str:
    """A random model whose tokenizer has that chat template."""
    place = save(folder, tokenizer(TEXTS["prose"], 290), seed)
    words = transformers.AutoTokenizer.from_pretrained(place)
    words.chat_template = template
    words.save_pretrained(place)
    return place


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Two that agree on their template, and a first one that has another."""
    given = {"base": NOISY, "a": PLAIN, "b": PLAIN + "\n", "bare": None}
    return {name: model(tmp_path / name, i, text) for i, (name, text) in enumerate(given.items())}


def merged(out: Path, models: list[str], **fields: Any) -> Any:
    """The tokenizer of a mean, by transformers."""
    listed = [{"model": place, "parameters": {"weight": 1.0}} for place in models]
    distmerge.merge({"merge_method": "linear", "models": listed, **fields}, str(out))
    return transformers.AutoTokenizer.from_pretrained(out)


def printed(words: Any, chat: list[dict[str, str]], ask: bool = True) -> str:
    text: str = words.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)
    return text


@pytest.mark.parametrize("vocabulary", [{}, {"tokenizer": {"source": "union"}}])
def test_auto_is_what_most_of_the_models_have(places, tmp_path, vocabulary):
    out = tmp_path / "out"
    words = merged(out, list(places.values()), chat_template="auto", **vocabulary)
    assert words.chat_template == PLAIN
    assert printed(words, CHAT) == "Hi|Yo|Bye|"
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == PLAIN


def test_of_equally_many_it_is_the_first_models(places, tmp_path):
    words = merged(tmp_path / "out", [places["base"], places["a"]], chat_template="auto")
    assert words.chat_template == NOISY


def test_the_base_counts_once(places, tmp_path):
    listed = [places["base"], places["a"], places["b"]]
    words = merged(tmp_path / "out", listed, base_model=places["base"] + "/", chat_template="auto")
    assert words.chat_template == PLAIN


def test_templates_are_found_where_older_and_newer_tokenizers_keep_them(tmp_path):
    places = [model(tmp_path / name, 1) for name in "abc"]
    config = tmp_path / "a" / "tokenizer_config.json"
    several = [{"name": "tool_use", "template": "-"}, {"name": "default", "template": PLAIN}]
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "chat_template": several}))
    (tmp_path / "b" / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    (tmp_path / "c" / "chat_template.jinja").write_text(NOISY)
    words = merged(tmp_path / "out", places, chat_template="auto")
    assert words.chat_template == PLAIN


def test_nothing_to_take_is_told(places, tmp_path):
    recipe = {"merge_method": "passthrough", "models": [places["bare"]], "chat_template": "auto"}
    request = load_recipe(recipe).request()
    assert [text.partition(": ")[2] for text in request.warnings] == [
        "none of the models has a chat template to take."
    ]
    assert request.tokenizer is None


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_by_its_name(places, tmp_path, name):
    words = merged(tmp_path / "out", [places["base"]], chat_template=name)
    assert printed(words, CHAT) == MEANT[name]
    assert printed(words, [TOLD, ASKED]) == BEGUN[name]
    if name != "mistral":  # where the question's end is the answer's begin
        assert MEANT[name].startswith(printed(words, CHAT, ask=False))
        assert printed(words, CHAT, ask=False) != MEANT[name]


def test_mistrals_turns_alternate(places, tmp_path):
    words = merged(tmp_path / "out", [places["base"]], chat_template="mistral")
    with pytest.raises(Exception, match="one after the other"):
        printed(words, [ASKED, ASKED])


def test_a_template_replaces_all_that_the_donor_has(tmp_path):
    place = model(tmp_path / "a", 1, {"default": NOISY, "tool_use": NOISY})
    assert "additional_chat_templates/tool_use.jinja" in names_below(Path(place))
    (tmp_path / "a" / "chat_template.json").write_text(json.dumps({"chat_template": NOISY}))
    words = merged(tmp_path / "out", [place], chat_template=PLAIN)
    assert words.chat_template == PLAIN
    written = names_below(tmp_path / "out")
    assert not [n for n in written if n.startswith("additional") or n == "chat_template.json"]
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == Path(place, name).read_bytes()


def test_what_transformers_adds_to_jinja_is_jinja():
    template = "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}"
    assert load_recipe(
        {
            "merge_method": "linear",
            "models": ["nowhere"],
            "chat_template": template + "{% endfor %}",
        }
    ).chat_template


@pytest.mark.parametrize(
    "huge",
    [
        "{{ 'x' * 10**11 }}",
        "{% set y = 'x' | center(10**11) %}",
        "{% autoescape 'x' * 10**11 %}{% endautoescape %}",
    ],
)
def test_reading_a_template_computes_nothing(huge):
    assert check_template(huge) == huge  # of 100 GB, else


@pytest.mark.parametrize(
    ("given", "told", "fix"),
    [
        ("{% for m in messages %}", "the template's line 1 is not Jinja", "name one: auto"),
        ("x\n{{ a b }}", "the template's line 2 is not Jinja", "name one: auto"),
        ("chatlm", "there is no chat template 'chatlm'", "'chatml'"),
        ("something", "there is no chat template 'something'", "alpaca"),
        (7, "it has to be text", "chat_template: auto"),
    ],
)
def test_what_is_no_template_is_refused_before_anything_is_read(given, told, fix):
    recipe = {"merge_method": "linear", "models": ["nowhere"], "chat_template": given}
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe)
    assert told in refused.value.headline
    assert fix in (refused.value.fix or "")


def test_a_template_needs_a_tokenizer(places, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path(places["bare"], name).unlink()
    recipe = {"merge_method": "passthrough", "models": [places["bare"]], "chat_template": "chatml"}
    with pytest.raises(RecipeError, match="bare has no tokenizer"):
        load_recipe(recipe).request()


def test_a_template_is_part_of_what_a_merge_is(places):
    def digest(**fields: Any) -> str:
        recipe = {"merge_method": "passthrough", "models": [places["a"]], **fields}
        return plan(recipe).digest

    found = [digest(), digest(chat_template="chatml"), digest(chat_template="llama3")]
    assert len(set(found)) == 3
