"""`on_shape_mismatch`: what is written of tensors whose shapes differ, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli.commands import call
from safetensors.torch import load_file, save_file

import distmerge
from distmerge.errors import RecipeError, ShapeMismatch
from distmerge.expressions.recipe import load_recipe
from distmerge.run.merge import plan

WIDTHS = {"base": 6, "a": 8, "b": 6}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, (name, words) in enumerate(WIDTHS.items()):
        random = torch.Generator().manual_seed(seed)
        (tmp_path / name).mkdir()
        tensors = {
            "embed": torch.randn(words, 3, generator=random),
            "layers.0.w": torch.randn(3, 3, generator=random),
            "positions": torch.arange(words),
        }
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


def recipe(policy: str | None, **keys) -> dict:
    given = {} if policy is None else {"on_shape_mismatch": policy}
    return {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": ["a", "b"],
        "parameters": {"weight": 0.5},
        **given,
        **keys,
    }


def held(name: str) -> dict[str, torch.Tensor]:
    return load_file(f"{name}/model.safetensors")


def test_without_it_the_merge_is_refused_and_the_fix_names_it(here):
    for policy in (None, "error"):
        with pytest.raises(ShapeMismatch, match="shape of 2 tensors") as raised:
            plan(recipe(policy))
        assert "8 x 3 in a" in str(raised.value)
        assert "on_shape_mismatch: base" in (raised.value.fix or "")


def test_base_copies_the_bases_and_merges_the_rest(here):
    distmerge.merge(recipe("base"), "out")
    merged, base, a, b = (held(name) for name in ("out", "base", "a", "b"))
    assert list(merged) == list(base)
    assert torch.equal(merged["embed"], base["embed"])
    assert torch.equal(merged["positions"], base["positions"])
    exact = 0.5 * a["layers.0.w"].double() + 0.5 * b["layers.0.w"].double()
    torch.testing.assert_close(merged["layers.0.w"].double(), exact, rtol=1e-6, atol=1e-6)
    reasons = {(s.model, s.key): s.reason for s in plan(recipe("base")).skipped}
    assert set(reasons) == {(m, k) for m in ("a", "b") for k in ("embed", "positions")}
    assert set(reasons.values()) == {
        "its key is written without this model (an on_... key, or passthrough)"
    }


def test_skip_leaves_them_out_with_the_reason(here):
    decided = plan(recipe("skip"))
    assert list(decided.weight_map) == ["layers.0.w"]
    reasons = {(s.model, s.key): s.reason for s in decided.skipped}
    assert set(reasons) == {(m, k) for m in WIDTHS for k in ("embed", "positions")}
    assert set(reasons.values()) == {"its shape differs between models (on_shape_mismatch)"}


def test_what_is_written_tells_the_policies_apart(here):
    assert len({plan(recipe(policy)).digest for policy in ("base", "skip")}) == 2
    fitting = [plan(recipe(policy, models=["b"])).digest for policy in ("error", "base", "skip")]
    assert len(set(fitting)) == 1


def test_it_goes_with_formulas_and_is_shown_by_explain(here):
    text = "models: {a: a, base: base}\nmerge: base + 0.5 * (a - base)\non_shape_mismatch: base\n"
    Path("merge.yml").write_text(text)
    shown = call("explain", "merge.yml", "embed")
    assert shown.exit_code == 0, shown.output
    assert "base  model.safetensors" in shown.stdout
    assert "its key is written without this model" in shown.stdout


def test_another_word_is_refused(here):
    with pytest.raises(RecipeError, match="on_shape_mismatch") as raised:
        load_recipe(recipe("average"))
    assert raised.value.fix == "on_shape_mismatch: error, base or skip"
