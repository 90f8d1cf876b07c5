"""Recipes as people write them, whole: they run unchanged, and warn where they say `# warns:`.

Each file is a form that is in circulation, shortened, with stand-ins for its models.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from parity.families import LAYERS, TUNED, make_family, off_by
from parity.oracle import Job, mergekit_merges
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

import distmerge
from distmerge.errors import RecipeError
from distmerge.expressions.chat_templates import named_template
from distmerge.expressions.recipe import load_recipe
from distmerge.expressions.recipe_text import read_documents
from distmerge.run.merge import plan

RECIPES = sorted(Path(__file__).parent.glob("*.yml"))
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
ASKED = {
    "dare_ties-weighted-base": TEMPLATE,
    "della_linear-filters": named_template("chatml"),
    "multislerp-strays": named_template("llama3"),
}
"""The chat templates of recipes that ask for one."""
RANDOM = ("dare_ties", "della_linear")
"""Methods whose masks are drawn."""
THEIRS = [
    path.stem
    for path in RECIPES
    if not path.stem.startswith(RANDOM) and len(read_documents(path)) == 1
]
"""Recipes that are one merge, whose result is no matter of chance."""


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = make_family(tmp_path_factory.mktemp("family"), step=2.0**-9)
    for name in ("base", *TUNED):
        letters().save_pretrained(folder / name)
    return folder


def letters():
    """A tokenizer of as many tokens as the models have rows."""
    tokens = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789", " "]
    words = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def here(family, tmp_path, monkeypatch):
    """A working directory that sees the models."""
    for name in ("base", *TUNED):
        (tmp_path / name).symlink_to(family / name)
    monkeypatch.chdir(tmp_path)


def expected_warnings(path: Path) -> dict[int, str]:
    """By line, a part of what it is to be warned of."""
    lines = path.read_text().splitlines()
    marked = ((n, line.partition("# warns: ")[2]) for n, line in enumerate(lines, start=1))
    return {n: text for n, text in marked if text}


def line_of(warning: str) -> int:
    found = re.search(r"line (\d+): ", warning)
    assert found, warning
    return int(found[1])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_runs_and_warns_exactly_where_it_should(path, here):
    request = plan(path).request  # what only the headers show, too
    warned = {line_of(text): text for text in request.warnings}
    expected = expected_warnings(path)
    assert len(warned) == len(request.warnings)
    assert warned.keys() == expected.keys()
    for line, part in expected.items():
        assert part in warned[line]

    distmerge.merge(path, "out")
    found = load_file("out/model.safetensors")
    last = list(yaml.safe_load_all(path.read_text()))[-1]
    dtype = getattr(torch, last.get("out_dtype") or last.get("dtype") or "float32")
    slices = last.get("slices", [{"sources": [{"layer_range": [0, LAYERS]}]}])
    ranges = [one["sources"][0]["layer_range"] for one in slices]
    layers = sum(end - start for start, end in ranges)
    every = load_file("base/model.safetensors")
    own = [key for key in every if ".layers." not in key]
    in_layers = [key for key in every if ".layers.0." in key]
    numbered = [k.replace(".0.", f".{n}.", 1) for k in in_layers for n in range(layers)]
    assert sorted(found) == sorted(own + numbered)
    written = transformers.AutoTokenizer.from_pretrained("out")
    assert written.chat_template == ASKED.get(path.stem, TEMPLATE)
    assert set(letters().get_vocab()) <= set(written.get_vocab())
    assert all(tensor.dtype == dtype and tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_strict_refuses_those_with_keys_without_effect(path, here):
    # A base's weight is mergekit's language, if without effect: it is told, not refused.
    facts = load_recipe(path).warnings
    if facts:
        with pytest.raises(RecipeError, match="keys without effect") as refused:
            load_recipe(path, strict=True)
        assert refused.value.facts == facts
    else:
        plan(path, strict=True)


def in_float32(path: Path, family: Path) -> Job:
    """The recipe with the models' own places, in which no rounding decides anything."""

    own = ("union", "base")  # of a vocabulary; by them no model is named

    def placed(given, key=None):
        if isinstance(given, dict):
            return {k: placed(v, k) for k, v in given.items()}
        if isinstance(given, list):
            return [placed(item) for item in given]
        named = key in ("model", "base_model") or (key == "source" and given not in own)
        return str(family / os.path.normpath(given)) if named else given

    recipe = placed(yaml.safe_load(path.read_text())) | {"dtype": "float32"}
    recipe.pop("out_dtype", None)
    return Job(path.stem, recipe)


@pytest.fixture(scope="module")
def theirs(family, tmp_path_factory):
    jobs = [in_float32(path, family) for path in RECIPES if path.stem in THEIRS]
    return mergekit_merges(jobs, tmp_path_factory.mktemp("mergekit"))


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", THEIRS)
def test_the_numbers_are_mergekits(name, family, theirs, tmp_path):
    expected = theirs[name]
    assert not isinstance(expected, str), expected
    job = in_float32(Path(__file__).with_name(f"{name}.yml"), family)
    distmerge.merge(job.text, str(tmp_path / "out"))
    gaps = off_by(load_file(tmp_path / "out" / "model.safetensors"), expected)
    assert max(gaps.values()) <= 1e-5, max(gaps, key=gaps.__getitem__)
