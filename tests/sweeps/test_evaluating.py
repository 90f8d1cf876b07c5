"""Evaluated sweeps: scores against evaluators called by hand on single merges."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from run.family import save_model, weight_bytes
from run.merging import small_models
from small_models import gpt2, save
from sweeps import judging
from sweeps.killing import kill_at_the_third_call

import distmerge
from distmerge.errors import MemoryBudgetError, RecipeError, SweepFailed, UnknownMethod
from distmerge.run.collect import collect
from distmerge.run.options import MergeOptions
from distmerge.sweeps import candidates
from distmerge.sweeps.definition import load_sweep
from distmerge.sweeps.evaluation import LARGEST_TEXT
from distmerge.sweeps.plan import plan_sweep

JUDGING = judging.__file__
SCALES = [0.2, 1.0, 0.5]
OPTIONS = {"workers": 2, "allowed_mem": "4GiB"}


@pytest.fixture
def recipe(tmp_path):
    base, other = (
        save_model(m, tmp_path / name) for m, name in zip(small_models(2), "ab", strict=True)
    )
    return _recipe(base, other)


@pytest.fixture(scope="module")
def gpts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpts")
    base = gpt2(1)
    return [save(base, folder / "base"), save(gpt2(2, base), folder / "other")]


def _recipe(base, other):
    return {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": other}],
        "parameters": {"weight": 1.0},
        "grid": {"parameters.lambda": SCALES},
    }


def single(recipe, scale, place):
    plain = {key: value for key, value in recipe.items() if key != "grid"}
    distmerge.merge(plain, str(place), overrides=[f"parameters.lambda={scale}"], **OPTIONS)
    return place


def lines(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_scores_are_those_of_single_merges_and_only_the_best_are_written(recipe, tmp_path):
    out = tmp_path / "out"
    results = distmerge.sweep(
        recipe, str(out), evaluate=f"{JUDGING}:norm", keep="best 2 by score", **OPTIONS
    )
    for result, scale in zip(results, SCALES, strict=True):
        assert result.settings == {"parameters.lambda": scale}
        place = single(recipe, scale, tmp_path / f"single-{scale}")
        assert result.score == judging.norm(distmerge.open(place).collect())
    best = sorted(results, key=lambda result: -result.score)[:2]
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders == {result.name for result in best}
    for result in best:
        scale = result.settings["parameters.lambda"]
        assert weight_bytes(result.place) == weight_bytes(tmp_path / f"single-{scale}")
    assert [one["name"] for one in lines(out)] == [result.name for result in results]
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [float(row["score"]) for row in rows] == [result.score for result in results]
    assert [row["written"] for row in rows] == [result.place or "" for result in results]
    assert [float(row["parameters.lambda"]) for row in rows] == SCALES


def test_a_score_that_keep_goes_by_is_missed_at_the_first_candidate(recipe, tmp_path):
    """As a notice: others may have it. That none has is an error, and no score is lost."""
    told, calls = [], []

    def loss(state_dict):
        calls.append(1)
        return {"loss": judging.norm(state_dict)}

    def listener(event):
        told.append((event.kind, event.data.get("text", "")))

    out, asked = str(tmp_path / "out"), {"evaluate": loss, "listener": listener, **OPTIONS}
    with pytest.raises(RecipeError, match="no candidate has a score 'accuracy'"):
        distmerge.sweep(recipe, out, keep="best 1 by accuracy", **asked)
    scored = [kind for kind, _ in told].index("score")
    missed = [i for i, (kind, text) in enumerate(told) if "no score 'accuracy'" in text]
    assert missed == [scored + 1]
    assert "it has loss" in told[missed[0]][1]
    results = distmerge.sweep(recipe, out, keep="best 1 by loss", **asked)
    assert len(calls) == len(results) == len(SCALES)


def test_the_table_grows_with_each_score(recipe, tmp_path):
    out, seen = tmp_path / "out", []

    def look(state_dict):
        table = out / "results.csv"
        rows = list(csv.DictReader(table.open())) if table.exists() else []
        seen.append([float(row["score"]) for row in rows])
        return len(seen)

    distmerge.sweep(recipe, str(out), evaluate=look, **OPTIONS)
    assert seen == [[], [1.0], [1.0, 2.0]]


def test_evaluated_at_once_candidates_are_merged_one_by_one(recipe, tmp_path, monkeypatch):
    """Each merge may take all the memory that is allowed."""
    together, merging, most = threading.Barrier(3, timeout=60), [], []

    def counted(*args, **options):
        merging.append(1)
        most.append(len(merging))
        time.sleep(0.1)
        try:
            return collect(*args, **options)
        finally:
            merging.pop()

    def all_at_once(state_dict):
        together.wait()
        return judging.whole(state_dict)

    monkeypatch.setattr(candidates, "collect", counted)
    asked = {"function": all_at_once, "at_once": 3, "distances": False}
    results = distmerge.sweep(recipe, str(tmp_path / "out"), evaluate=asked, **OPTIONS)
    assert len(results) == len(most) == 3
    assert max(most) == 1


@pytest.mark.parametrize("given", ["state_dict", "model"])
def test_distances_from_the_parents_are_those_of_whole_tensors(gpts, tmp_path, given):
    evaluate = {"function": lambda candidate: 1, "given": given}
    results = distmerge.sweep(
        _recipe(*gpts), str(tmp_path / "out"), evaluate=evaluate, keep="all", **OPTIONS
    )
    for result in results:
        made = distmerge.open(result.place).collect()
        assert list(result.distances) == ["base", "other"]
        for parent, place in zip(result.distances, gpts, strict=True):
            theirs = distmerge.open(place).collect()
            apart = [(made[key].double() - theirs[key].double()).norm() for key in made]
            size = torch.stack([theirs[key].double().norm() for key in made]).norm()
            wanted = float(torch.stack(apart).norm() / size)
            assert result.distances[parent] == pytest.approx(wanted, rel=1e-9)
    far = distmerge.sweep(
        _recipe(*gpts), str(tmp_path / "no"), evaluate={**evaluate, "distances": False}, **OPTIONS
    )
    assert [one.distances for one in far] == [{}] * 3


def test_the_report_stands_alone_and_shows_every_candidate(gpts, tmp_path):
    recipe = {**_recipe(*gpts), "list": [{"merge_method": "ties"}, {"merge_method": "linear"}]}
    recipe["grid"] = {"models.0.parameters.weight": [0.3, 0.6]}
    out = tmp_path / "out"
    results = distmerge.sweep(
        recipe, str(out), evaluate=f"{JUDGING}:two", keep="best 2 by loss", **OPTIONS
    )
    text = (out / "report.html").read_text()
    assert not re.search(r"<script|https?://|src=|href=|@import|url\(", text)
    page = xml.etree.ElementTree.fromstring(  # our own
        re.sub(r"<!DOCTYPE html>|<meta [^>]*>", "", text)
    )
    rows = [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]
    assert rows[0][:4] == ["", "candidate", "loss", "process"]
    best = sorted(results, key=lambda result: result.scores["loss"])
    assert [row[1] for row in rows[1:]] == [result.name for result in best]
    assert [float(row[2]) for row in rows[1:]] == pytest.approx(
        [result.scores["loss"] for result in best], rel=1e-4
    )
    pictures = list(page.iter("svg"))
    assert len(pictures) == 1 + 2 + 2, "settings and parents, each against the score"
    for picture in pictures:
        marks = [*picture.iter("circle"), *picture.iter("polyline")]
        named = [mark.find("title").text.splitlines()[0] for mark in marks]
        assert sorted(named) == sorted(result.name for result in results)
    lines_ = [
        [tuple(map(float, p.split(","))) for p in line.get("points").split()]
        for line in pictures[0].iter("polyline")
    ]
    ends = [line[-1][1] for line in lines_][::-1]  # drawn from the worst to the best
    assert ends == sorted(ends, reverse=True), "a lower score stands lower"


def test_the_lowest_can_be_the_best(recipe, tmp_path):
    for keep in ("best 1 by loss", "best 1 by process (lowest)", "best 1 by loss (highest)"):
        results = distmerge.sweep(
            recipe, str(tmp_path / keep), evaluate=f"{JUDGING}:two", keep=keep, **OPTIONS
        )
        name, order = keep.split()[3], max if "highest" in keep else min
        (written,) = [result for result in results if result.place]
        assert written.scores[name] == order(result.scores[name] for result in results)


def test_a_repeated_sweep_evaluates_only_what_it_has_no_score_for(recipe, tmp_path):
    out, seen = tmp_path / "out", []

    def norm(state_dict):
        seen.append(state_dict)
        return judging.norm(state_dict)

    first = distmerge.sweep(recipe, str(out), evaluate=norm, **OPTIONS)
    assert len(seen) == 3
    assert not any(path.is_dir() for path in out.iterdir()), "without keep none is written"
    more = {**recipe, "grid": {"parameters.lambda": [*SCALES, 0.7]}}
    second = distmerge.sweep(more, str(out), evaluate=norm, keep="best 1 by score", **OPTIONS)
    assert len(seen) == 4
    assert [r.scores for r in second[:3]] == [r.scores for r in first]
    assert [one["name"] for one in lines(out)] == [result.name for result in second]
    third = save_model(small_models(3)[2], tmp_path / "c")
    other = {**recipe, "models": [{"model": third}]}
    distmerge.sweep(other, str(out), evaluate=norm, **OPTIONS)
    assert len(seen) == 7, "scores of other models don't hold"
    distmerge.sweep(other, str(out), evaluate=f"{JUDGING}:norm", **OPTIONS)
    assert len(seen) == 7
    assert len(lines(out)) == 4


@pytest.mark.parametrize("at_once", [1, 3])
def test_one_that_fails_does_not_stop_the_others_and_is_tried_again(recipe, tmp_path, at_once):
    out = tmp_path / "out"
    asked = {"function": f"{JUDGING}:picky", "at_once": at_once}
    recipe["grid"] = {"parameters.lambda": [0.2, 30, 0.5]}
    for _ in range(2):
        with pytest.raises(SweepFailed) as raised:
            distmerge.sweep(recipe, str(out), evaluate=asked, keep="best 3 by score", **OPTIONS)
        assert "1 of 3 candidates failed" in str(raised.value)
        assert "RuntimeError: too large" in str(raised.value)
        found = {one["name"]: one for one in lines(out)}
        assert len(lines(out)) == 3
        assert found["lambda=30"]["error"] == "RuntimeError: too large"
        assert found["lambda=30"]["scores"] == {}
        written = {path.name for path in out.iterdir() if path.is_dir()}
        assert written == {"lambda=0.2", "lambda=0.5"}


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (math.nan, "returned nan for score"),
        ({"a": math.inf}, "returned inf for a"),
        ("good", "returned a str for score"),
        (None, "returned a NoneType for score"),
        ({}, "returned no score"),
        (torch.ones(2), "returned a Tensor for score"),
    ],
)
def test_what_is_no_finite_number_is_told(recipe, tmp_path, returned, words):
    with pytest.raises(SweepFailed, match=words):
        distmerge.sweep(
            recipe, str(tmp_path / "out"), evaluate=lambda state_dict: returned, **OPTIONS
        )


def test_an_evaluator_that_ends_the_program_has_failed(recipe, tmp_path):
    with pytest.raises(SweepFailed, match="SystemExit: 0"):
        distmerge.sweep(recipe, str(tmp_path / "out"), evaluate=lambda _: sys.exit(0), **OPTIONS)
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(0)")
    given = f"{tmp_path / 'mine.py'}:score"
    with pytest.raises(UnknownMethod, match="can't be run: SystemExit: 0"):
        distmerge.sweep(recipe, str(tmp_path / "other"), evaluate=given, **OPTIONS)


def test_numbers_of_torch_and_numpy_are_numbers(recipe, tmp_path):
    scores = {"a": torch.tensor(2.5), "b": torch.ones(2).numpy()[0]}
    results = distmerge.sweep(
        recipe, str(tmp_path / "out"), evaluate=lambda state_dict: scores, **OPTIONS
    )
    assert [result.scores for result in results] == [{"a": 2.5, "b": 1.0}] * 3


def test_a_candidate_as_state_dict_has_dtype_and_seed_of_the_output(recipe, tmp_path):
    recipe |= {"merge_method": "dare_linear", "out_dtype": "bfloat16", "seed": 5}
    recipe["grid"] = {"parameters.density": [0.5]}
    recipe["list"] = [{"seed": 3}]
    kept = {}

    def look(state_dict):
        kept.update(state_dict.collect())
        kept["half"] = (state_dict * 0.5)["a"]
        return 1

    (result,) = distmerge.sweep(recipe, str(tmp_path / "out"), evaluate=look, keep="all", **OPTIONS)
    written = distmerge.open(result.place).collect()
    half = kept.pop("half")
    assert kept.keys() == written.keys()
    assert all(torch.equal(kept[key], written[key]) for key in written)
    assert kept["a"].dtype == torch.bfloat16
    assert half.shape == kept["a"].shape


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_models_and_pipelines_are_those_that_transformers_loads(gpts, tmp_path, dtype):
    recipe = {**_recipe(*gpts), **({"out_dtype": dtype} if dtype else {})}
    out = tmp_path / "out"
    as_model = distmerge.sweep(
        recipe, str(out), evaluate=f"{JUDGING}:weights", keep="all", **OPTIONS
    )
    as_pipeline = distmerge.sweep(
        recipe, str(out), evaluate={"function": f"{JUDGING}:writes", "at_once": 2}, **OPTIONS
    )
    for model, pipeline in zip(as_model, as_pipeline, strict=True):
        loaded = transformers.pipeline("text-generation", model.place)
        assert model.scores == judging.weights(loaded.model)
        assert pipeline.scores == judging.writes(loaded)


def test_memory_that_models_need_is_checked_before_anything_is_read(gpts, tmp_path):
    def plan(given, allowed):
        evaluate = {"function": judging.norm, "given": given, "at_once": 200_000}
        sweep = load_sweep(_recipe(*gpts), judging={"evaluate": evaluate})
        return plan_sweep(sweep, MergeOptions(workers=1, allowed_mem=allowed))

    with pytest.raises(
        MemoryBudgetError, match="To evaluate 200,000 candidates as a model takes"
    ) as no:
        plan("model", "1500MiB")
    enough = no.value.fix.split()[1].rstrip(",")
    assert plan("model", enough).scoring.merging > 0
    assert plan("state_dict", "1500MiB").scoring.merging > 1400 << 20


def test_perplexity_is_that_of_transformers_own_loss(gpts, tmp_path):
    text = tmp_path / "heldout.txt"
    text.write_text("the cat sat on a mat and then the dog ran on the hill " * 2)
    results = distmerge.sweep(
        _recipe(*gpts),
        str(tmp_path / "out"),
        evaluate={"perplexity": str(text), "context": 8, "stride": 4},
        keep="best 1 by perplexity",
        **OPTIONS,
    )
    for result, scale in zip(results, SCALES, strict=True):
        place = single(_recipe(*gpts), scale, tmp_path / f"single-{scale}")
        model = transformers.AutoModelForCausalLM.from_pretrained(place).eval()
        tokens = transformers.AutoTokenizer.from_pretrained(place)(text.read_text()).input_ids
        nats = [0.0]
        for at in range(1, len(tokens)):  # one by one: windows of 8 that begin every 4
            start = 0 if at < 8 else 4 * ((at - 8) // 4 + 1)
            with torch.no_grad():
                logits = model(torch.tensor([tokens[start:at]])).logits[0, -1]
            nats.append(-torch.log_softmax(logits.double(), 0)[tokens[at]].item())
        assert result.scores["perplexity"] == pytest.approx(
            math.exp(sum(nats) / (len(tokens) - 1)), rel=1e-5
        )
    (best,) = [result for result in results if result.place]
    assert best.scores["perplexity"] == min(r.scores["perplexity"] for r in results)


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"evaluate": "judging"}, RecipeError, "module:function, or path/to/file.py:function"),
        ({"evaluate": "no_such_module:score"}, UnknownMethod, "no_such_module"),
        ({"evaluate": f"{JUDGING}:nothing"}, UnknownMethod, "defines no 'nothing'"),
        ({"evaluate": {"given": "model"}}, RecipeError, "a function, or perplexity"),
        ({"evaluate": {"perplexity": "nowhere.txt"}}, RecipeError, "text .* can't be read"),
        ({"evaluate": {"perplexity": "/dev/zero"}}, RecipeError, "no regular file"),
        ({"evaluate": {"perplexity": "."}}, RecipeError, "no regular file"),
        ({"evaluate": {"perplexity": "~nobody-of-that-name/x"}}, RecipeError, "can't be read"),
        ({"evaluate": {"perplexity": "a\0b"}}, RecipeError, "can't be read"),
        ({"evaluate": {"function": "a:b", "given": "tensor"}}, RecipeError, "given"),
        ({"evaluate": {"function": "a:b", "stride": 4}}, RecipeError, "stride has no effect"),
        ({"evaluate": {"function": "a:b", "at_once": 0}}, RecipeError, "at_once"),
        ({"evaluate": lambda: 1}, RecipeError, "takes nothing"),
        ({"keep": "best 1 by score"}, RecipeError, "there is no 'evaluate'"),
        ({"evaluate": f"{JUDGING}:norm", "keep": "three"}, RecipeError, "'best 3 by score'"),
        ({"evaluate": f"{JUDGING}:norm", "keep": "best 0 by score"}, RecipeError, "best 3 by"),
        ({"evaluate": f"{JUDGING}:norm", "keep": "best 1 by x"}, RecipeError, "no .* score 'x'"),
    ],
)
def test_mistakes_are_told_in_words(recipe, tmp_path, keys, error, words):
    with pytest.raises(error, match=words):
        distmerge.sweep(recipe, str(tmp_path / "out"), **keys, **OPTIONS)


def test_a_text_beyond_all_measure_is_refused(recipe, tmp_path):
    with (tmp_path / "text").open("wb") as file:
        file.truncate(LARGEST_TEXT + 1)
    evaluate = {"perplexity": str(tmp_path / "text")}
    with pytest.raises(RecipeError, match="more than 268,435,456 bytes"):
        distmerge.sweep(recipe, str(tmp_path / "out"), evaluate=evaluate, **OPTIONS)


@pytest.mark.full
def test_killed_in_the_middle_no_score_is_lost_or_made_twice(recipe, tmp_path):
    recipe["grid"] = {"parameters.lambda": [0.1, 0.2, 0.3, 0.4, 0.5]}
    recipe |= {"evaluate": f"{JUDGING}:slow", "keep": "best 2 by score"}
    path, out = tmp_path / "sweep.yml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "distmerge.cli", "sweep", path, out]
    environment = kill_at_the_third_call(command, tmp_path)
    calls = tmp_path / "calls"
    before = lines(out)
    assert [one["name"] for one in before] == ["lambda=0.1", "lambda=0.2"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert calls.stat().st_size == 3 + 3, "the one that was stopped, and two more"
    assert lines(out)[:2] == before
    assert [one["name"] for one in lines(out)] == [f"lambda=0.{i}" for i in range(1, 6)]
    assert "2 of 5 candidates have their scores already" in done.stderr
    assert "Leaderboard" in done.stdout
    place = single(
        {k: v for k, v in recipe.items() if k not in ("evaluate", "keep")}, 0.5, tmp_path / "one"
    )
    written = [p.name for p in Path(out).iterdir() if p.is_dir()]
    assert len(written) == 2
    if "lambda=0.5" in written:
        assert weight_bytes(place) == weight_bytes(out / "lambda=0.5")


@pytest.mark.full
def test_on_ray_scores_are_the_same_and_made_elsewhere(recipe, tmp_path):
    here = distmerge.sweep(
        recipe, str(tmp_path / "here"), evaluate=f"{JUDGING}:two", keep="best 1 by loss", **OPTIONS
    )
    there = distmerge.sweep(
        recipe,
        str(tmp_path / "there"),
        evaluate={"function": f"{JUDGING}:two", "at_once": 2},
        keep="best 1 by loss",
        engine="ray",
        workers=2,
        allowed_mem="1GiB",
    )
    assert [r.scores["loss"] for r in there] == [r.scores["loss"] for r in here]
    assert os.getpid() not in {r.scores["process"] for r in there}
    (mine,), (theirs,) = ([r.place for r in found if r.place] for found in (here, there))
    assert weight_bytes(mine) == weight_bytes(theirs)
