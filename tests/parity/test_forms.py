"""Recipes of unusual forms, all of which mergekit 0.1.5 runs: they run, with its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from parity.families import in_family, make_family, off_by
from parity.oracle import Job, mergekit_merges
from safetensors.torch import load_file

import distmerge

pytestmark = [pytest.mark.full, pytest.mark.timeout(3000)]


def m(model: str, **parameters: Any) -> dict[str, Any]:
    return {"model": model, **({"parameters": parameters} if parameters else {})}


def s(*sources: tuple[str, int, int] | tuple[str, int, int, dict[str, Any]], **keys: Any) -> Any:
    """A slice of (model, first layer, one past the last, parameters)."""
    listed = [
        {**m(model, **(more[0] if more else {})), "layer_range": [first, last]}
        for model, first, last, *more in sources
    ]
    return {"sources": listed, **keys}


def w(weight: Any, **more: Any) -> dict[str, Any]:
    return {"weight": weight, **more}


def two(a: Any, b: Any, **general: Any) -> dict[str, Any]:
    return {"models": [m("a", **a), m("b", **b)], "parameters": general}


ZEROED = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
BY_LAYER = [
    {"filter": "layers.0", "value": 0.1},
    {"filter": "layers.1", "value": 2},
    {"value": 0.5},
]
BY_PART = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0]}]
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "a filter of all": ("linear", two(w([{"filter": "*", "value": 0.3}, {"value": 9}]), w(1))),
    "a filter of nothing": ("linear", two(w([{"filter": None, "value": 0.3}]), w(1))),
    "a value before its filter": (
        "linear",
        two(w([{"value": 0.3}, {"filter": "mlp", "value": 9}]), w(1)),
    ),
    "one filter alone": ("linear", two(w({"filter": "mlp", "value": 0.9}), {}, weight=0.4)),
    "filters are no patterns": (
        "linear",
        two(w([{"filter": "mlp.*", "value": 9}, {"value": 0.5}]), w(0.6)),
    ),
    "a filter of a number": ("linear", two(w([{"filter": ".1.", "value": 9}]), {}, weight=0.4)),
    "filters of head and embeddings": (
        "linear",
        two(w([{"filter": "lm_head", "value": 9}, {"filter": "embed", "value": 4}]), {}, weight=1),
    ),
    "gradients in filters": (
        "slerp",
        {
            "base_model": "a",
            "models": [m("a"), m("b")],
            "parameters": {"t": [*BY_PART, {"value": 0.5}]},
        },
    ),
    "a gradient of flags": ("linear", two(w(0.3), w(0.9), normalize=[True, False])),
    "a flag as a number": (
        "ties",
        {**two(w(0.3), w("9e-1"), density=0.5, normalize=0.0, int8_mask=1.0), "base_model": "base"},
    ),
    "a flag as a word": ("linear", two(w(0.3), w(0.9), normalize="no")),
    "a weight that is true": ("linear", two(w(True), w(0.9))),
    "an integer of a float": ("karcher", two({}, {}, max_iter=5.0, tol="1e-4")),
    "a gradient longer than the model": (
        "task_arithmetic",
        {**two(w([0, 0.1, 0.2, 0.5, 0.2, 0.1, 0]), w([1])), "base_model": "base"},
    ),
    "ranges that differ": (
        "linear",
        {"slices": [s(("a", 0, 2, w(0.4)), ("b", 1, 3, w(0.6))), s(("c", 2, 3, w(1)))]},
    ),
    "layers in reverse": ("passthrough", {"slices": [s(("a", n, n + 1)) for n in (2, 1, 0)]}),
    "layers that come twice, scaled": (
        "passthrough",
        {"slices": [s(("a", 0, 2)), s(("a", 1, 3, {"scale": ZEROED}))]},
    ),
    "more models in the first slice": (
        "linear",
        {"slices": [s(("b", 0, 2, w(0.5)), ("c", 0, 2, w(0.5))), s(("a", 1, 3, w(1)))]},
    ),
    "a gradient for each slice": (
        "slerp",
        {
            "base_model": "a",
            "slices": [
                s(("a", 0, 2), ("b", 0, 2), parameters={"t": [0, 1]}),
                s(("a", 2, 3), ("b", 2, 3), parameters={"t": [0.2, 0.8]}),
            ],
        },
    ),
    "one gradient for all slices": (
        "slerp",
        {
            "base_model": "a",
            "parameters": {"t": [0, 0.3, 1]},
            "slices": [s(("a", 0, 2), ("b", 0, 2)), s(("a", 2, 3), ("b", 2, 3))],
        },
    ),
    "filters of layers that move": (
        "linear",
        {"slices": [s(("a", 1, 3, w(BY_LAYER)), ("b", 0, 2, w(BY_LAYER)))]},
    ),
    "filters of layers that move, for all": (
        "linear",
        {"slices": [s(("a", 1, 3), ("b", 0, 2))], "parameters": {"weight": BY_LAYER}},
    ),
    "filters of no model's": (
        "slerp",
        {
            "base_model": "a",
            "slices": [s(("a", 1, 3), ("b", 1, 3))],
            "parameters": {"t": [{"filter": "layers.0", "value": 0.1}, {"value": 0.9}]},
        },
    ),
    "a base for each slice": (
        "task_arithmetic",
        {
            "slices": [
                s(("a", 0, 2, w(0.4)), ("b", 0, 2, w(1)), ("base", 0, 2), base_model="base"),
                s(("a", 2, 3, w(0.4)), ("c", 2, 3), base_model="c"),
            ]
        },
    ),
    "a module": (
        "linear",
        {"modules": {"default": {**two({}, w(0.6), weight=0.2)}}, "parameters": {"weight": 0.9}},
    ),
    "a module of slices": (
        "linear",
        {"modules": {"default": {"slices": [s(("a", 0, 3, w(0.4)), ("b", 0, 3, w(0.6)))]}}},
    ),
    "a base that is listed second": (
        "slerp",
        {"base_model": "b", "models": [m("a"), m("b")], "parameters": {"t": "3e-1"}},
    ),
    "a base that is not listed, with a weight": (
        "linear",
        {**two(w(0.4), w(0.6), weight=0.3), "base_model": "base"},
    ),
    "a listed base of nuslerp": (
        "nuslerp",
        {"base_model": "base", "models": [m("base"), m("a", weight=0.3), m("b", weight=0.4)]},
    ),
    "a listed base of multislerp": (
        "multislerp",
        {"base_model": "base", "models": [m("a", weight=0.3), m("base"), m("b", weight=0.3)]},
    ),
    **{
        f"a base alone, {name}": (name, {"base_model": "base", "models": [m("base", weight=0.5)]})
        for name in ("ties", "dare_linear", "della", "breadcrumbs", "sce", "ram", "ramplus_tl")
    },
    "a base alone in a slice": (
        "task_arithmetic",
        {
            "base_model": "base",
            "slices": [s(("base", 1, 3), ("a", 1, 3, w(0.5))), s(("base", 0, 2))],
        },
    ),
    "weights that vote against each other": (
        "ties",
        {**two(w(-0.4), w(0.6), density=0.5), "base_model": "base"},
    ),
    "weights that cancel out": (
        "task_arithmetic",
        {**two(w(-0.5), w(0.5), normalize=True), "base_model": "base"},
    ),
    "weights of nothing": ("ties", {**two(w(0), w(0), density=0.5), "base_model": "base"}),
    "a density of nothing": ("ties", {**two(w(1), w(0.5), density=0), "base_model": "base"}),
    "a density below one entry": (
        "ties",
        {**two(w(1), w(0.5), density=1e-6), "base_model": "base"},
    ),
    "more cut than is kept": (
        "breadcrumbs",
        {**two(w(0.5, gamma=0.3), w(0.5), density=0.9), "base_model": "base"},
    ),
    "no variance kept": ("sce", {**two({}, {}, select_topk=0.0), "base_model": "base"}),
    "an output wider than its arithmetic": (
        "linear",
        {**two(w(0.3), w(0.9)), "dtype": "torch.float32", "out_dtype": "float64"},
    ),
    "in double precision": ("linear", {**two(w(0.3), w(0.9)), "dtype": "float64"}),
    "without a dtype": ("linear", {**two(w(0.3), w(0.9)), "dtype": None}),
    "keys without a value": (
        "karcher",
        {"models": [{"model": "a", "parameters": None}, m("b")], "parameters": None},
    ),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("family"), step=2.0**-9, scattered=True)


def job(name: str, family: Path) -> Job:
    method, fields = FORMS[name]
    return Job(name, {"merge_method": method, "dtype": "float32", **in_family(fields, family)})


@pytest.fixture(scope="module")
def theirs(family, tmp_path_factory):
    jobs = [job(name, family) for name in FORMS]
    return mergekit_merges(jobs, tmp_path_factory.mktemp("mergekit"))


@pytest.mark.parametrize("name", FORMS)
def test_the_same_numbers(name, family, theirs, tmp_path):
    expected = theirs[name]
    assert not isinstance(expected, str), expected
    distmerge.merge(job(name, family).text, str(tmp_path / "out"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    gaps = off_by(found, expected)
    assert max(gaps.values()) <= 1e-5, max(gaps, key=gaps.__getitem__)
    assert all(found[key].dtype == tensor.dtype for key, tensor in expected.items())
