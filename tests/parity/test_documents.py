"""Recipes of several documents, beside mergekit-multi 0.1.5, which writes each to a folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from parity.families import in_family, make_family, off_by
from parity.oracle import ensure_mergekit
from safetensors.torch import load_file

import distmerge

pytestmark = [pytest.mark.full, pytest.mark.timeout(3000)]


def m(model: str, **parameters: Any) -> dict[str, Any]:
    return {"model": model, **({"parameters": parameters} if parameters else {})}


def layers(model: str, first: int, last: int) -> dict[str, Any]:
    return {"sources": [{"model": model, "layer_range": [first, last]}]}


def linear(name: str | None, *models: dict[str, Any], **keys: Any) -> dict[str, Any]:
    named = {"name": name} if name else {}
    return {**named, "merge_method": "linear", "models": list(models), **keys}


CORE = linear("core", m("a", weight=0.25), m("b", weight=0.75))
RECIPES: dict[str, list[dict[str, Any]]] = {
    "a merge of merges": [
        CORE,
        {
            "name": "voice",
            "merge_method": "slerp",
            "base_model": "c",
            "models": [m("c"), m("d")],
            "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.3}]},
        },
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [m("core", weight=0.4), m("voice", weight=[0.2, 0.9]), m("a", weight=0.1)],
        },
    ],
    "layers of merges": [
        CORE,
        {
            "name": "voice",
            "merge_method": "nuslerp",
            "models": [m("c", weight=0.6), m("d", weight=0.4)],
        },
        {
            "merge_method": "passthrough",
            "slices": [layers("base", 0, 1), layers("core", 1, 3), layers("voice", 2, 3)],
        },
    ],
    "a merge as the base": [
        CORE,
        {
            "merge_method": "ties",
            "base_model": "core",
            "models": [m("c", weight=0.5, density=0.4), m("d", weight=0.8, density=0.6)],
        },
    ],
    "a chain, last document first": [
        linear(None, m("third", weight=0.5), m("base", weight=0.5)),
        linear("third", m("second", weight=0.3), m("d", weight=0.7)),
        linear("second", m("core", weight=[0, 1]), m("c", weight=1)),
        CORE,
    ],
    "one document used twice": [
        CORE,
        linear("left", m("core", weight=0.9), m("c", weight=0.1)),
        linear("right", m("core", weight=0.1), m("d", weight=0.9)),
        linear(None, m("left", weight=0.5), m("right", weight=0.5)),
    ],
    "of more layers than its models": [
        {
            "name": "tall",
            "merge_method": "passthrough",
            "slices": [layers("a", 0, 2), layers("b", 1, 3)],
        },
        {
            "merge_method": "linear",
            "slices": [
                {
                    "sources": [
                        {**m("tall", weight=0.4), "layer_range": [1, 4]},
                        {**m("c", weight=0.6), "layer_range": [0, 3]},
                    ]
                }
            ],
        },
    ],
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("family"), step=2.0**-9, scattered=True)


def recipe_of(name: str, family: Path) -> str:
    documents = [{"dtype": "float32", **in_family(document, family)} for document in RECIPES[name]]
    return yaml.safe_dump_all(documents, sort_keys=False)


def theirs(text: str, place: Path) -> dict[str, Path]:
    """What mergekit-multi writes: the result, and each document that has a name."""
    place.mkdir()
    (place / "recipe.yml").write_text(text)
    multi = ensure_mergekit().with_name("mergekit-multi")
    command = [multi, place / "recipe.yml", "-I", place / "parts", "--out-path", place / "out"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--no-copy-tokenizer"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {"": place / "out", **{path.name: path for path in (place / "parts").iterdir()}}


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_numbers(name, family, tmp_path):
    text = recipe_of(name, family)
    written = theirs(text, tmp_path / "theirs")
    named = [document["name"] for document in RECIPES[name] if "name" in document]
    assert sorted(written) == ["", *sorted(named)]
    parts, out = tmp_path / "parts", tmp_path / "ours"
    distmerge.merge(text, str(out), keep_intermediates=str(parts))
    for document, place in written.items():
        ours = load_file((parts / document if document else out) / "model.safetensors")
        expected = load_file(place / "model.safetensors")
        assert set(ours) == set(expected), document
        gaps = off_by(ours, expected)
        assert max(gaps.values()) <= 1e-5, (document, max(gaps, key=gaps.__getitem__))
    # Computed where they are needed, or written first: the numbers are the same.
    distmerge.merge(text, str(tmp_path / "alone"))
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    assert max(off_by(alone, load_file(written[""] / "model.safetensors")).values()) <= 1e-5
