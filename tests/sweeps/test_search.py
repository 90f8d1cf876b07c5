"""Searches: what a study proposes is a candidate of the space, and its scores are those of single
merges; a stopped search goes on from its storage."""

from __future__ import annotations

import json
import subprocess
import sys

import optuna
import pytest
import yaml
from run.family import save_model, weight_bytes
from run.merging import small_models
from small_models import gpt2, save
from sweeps import judging
from sweeps.killing import kill_at_the_third_call

import distmerge
from distmerge import search
from distmerge.errors import RecipeError
from distmerge.sweeps.space import Space, fits
from distmerge.sweeps.trials import suggest

JUDGING = judging.__file__
OPTIONS = {"workers": 2, "allowed_mem": "4GiB"}


@pytest.fixture
def recipe(tmp_path):
    base, other = (
        save_model(m, tmp_path / name) for m, name in zip(small_models(2), "ab", strict=True)
    )
    return {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": other}],
        "parameters": {"weight": 1.0},
        "sample": {"over": {"parameters.lambda": {"min": 0, "max": 1}}},
    }


@pytest.fixture(scope="module")
def gpts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpts")
    base = gpt2(1)
    return [save(base, folder / "base"), save(gpt2(2, base), folder / "other")]


def lines(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def study_of(out):
    storage = f"sqlite:///{out}/study.db"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)


def bowl(state_dict):
    """Lowest where a quarter of the task vector is added: read off one element."""
    global _ends
    share = (float(state_dict["a"][0, 0]) - _ends[0]) / (_ends[1] - _ends[0])
    return {"loss": (share - 0.25) ** 2}


@pytest.fixture
def ends(recipe):
    global _ends
    places = [recipe["base_model"], recipe["models"][0]["model"]]
    _ends = [float(distmerge.open(place)["a"][0, 0]) for place in places]


@pytest.mark.parametrize(
    "sampler",
    ["tpe", *(pytest.param(name, marks=pytest.mark.full) for name in ("cmaes", "random", "qmc"))],
)
def test_every_sampler_comes_near_the_best_and_it_is_written(recipe, tmp_path, ends, sampler):
    out = tmp_path / "out"
    results = search(
        recipe,
        str(out),
        trials=16,
        sampler=sampler,
        evaluate=bowl,
        keep="best 1 by loss",
        seed=3 + (1 << 32),  # more than numpy takes
        **OPTIONS,
    )
    assert len(results) == len({r.settings["parameters.lambda"] for r in results}) <= 16
    for result in results:
        share = result.settings["parameters.lambda"]
        assert result.scores["loss"] == pytest.approx((share - 0.25) ** 2, abs=1e-5)
    (best,) = [result for result in results if result.place]
    assert best.scores == min((r.scores for r in results), key=lambda s: s["loss"])
    assert abs(best.settings["parameters.lambda"] - 0.25) < 0.15
    plain = {key: value for key, value in recipe.items() if key != "sample"}
    change = f"parameters.lambda={best.settings['parameters.lambda']}"
    distmerge.merge(plain, str(tmp_path / "one"), overrides=[change], **OPTIONS)
    assert weight_bytes(best.place) == weight_bytes(tmp_path / "one")
    assert [one["name"] for one in lines(out)] == [result.name for result in results]
    trials = study_of(out).trials
    assert len(trials) == 16
    assert study_of(out).best_value == best.scores["loss"]
    assert (out / "report.html").exists()


def test_repeated_it_goes_on_with_the_study(recipe, tmp_path, ends):
    seen = []

    def counted(state_dict):
        seen.append(1)
        return -bowl(state_dict)["loss"]

    out = tmp_path / "out"
    first = search(recipe, str(out), trials=3, evaluate=counted, **OPTIONS)
    again = search(recipe, str(out), trials=3, evaluate=counted, **OPTIONS)
    assert again == first
    assert len(seen) == 3
    more = search(recipe, str(out), trials=5, evaluate=counted, keep="best 1 by score", **OPTIONS)
    assert len(seen) == 5
    assert [r.scores for r in more[:3]] == [r.scores for r in first]
    assert study_of(out).best_value == max(r.score for r in more)


@pytest.mark.full
def test_killed_in_the_middle_it_resumes_from_its_storage(recipe, tmp_path):
    recipe |= {"evaluate": f"{JUDGING}:slow", "keep": "best 1 by score"}
    path, out = tmp_path / "sweep.yml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe))
    storage = f"sqlite:///{tmp_path}/elsewhere.db"
    command = [sys.executable, "-m", "distmerge.cli", "search", path, out]
    log = tmp_path / "events.jsonl"
    command += ["--trials", "5", "--storage", storage, "--event-log", log]
    environment = kill_at_the_third_call(command, tmp_path)
    calls = tmp_path / "calls"
    before = lines(out)
    assert len(before) == 2
    (name,) = optuna.get_all_study_names(storage)
    stopped = optuna.load_study(study_name=name, storage=storage).trials[-1]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert "Leaderboard" in done.stdout
    assert calls.stat().st_size == 3 + 3, "the one that was stopped, and two more"
    after = lines(out)
    assert after[:2] == before
    assert len(after) == len({one["digest"] for one in after}) == 5
    trials = optuna.load_study(study_name=name, storage=storage).trials
    assert [t.state.name for t in trials].count("COMPLETE") == 5
    assert trials[3].params == stopped.params
    told = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert told.count("score") == 5


def test_a_score_that_the_study_was_not_told_is_not_made_again(recipe, tmp_path, ends):
    out, seen = tmp_path / "out", []

    def counted(state_dict):
        seen.append(1)
        return bowl(state_dict)["loss"]

    first = search(recipe, str(out), trials=2, evaluate=counted, **OPTIONS)
    study = study_of(out)
    known = study.trials[1]
    # As if the run had been stopped between keeping the second result and telling the study.
    study.enqueue_trial(known.params)
    again = search(recipe, str(out), trials=3, evaluate=counted, **OPTIONS)
    assert len(seen) == 2
    assert again == first
    assert len(lines(out)) == 2


def test_trials_that_yield_worse_scores_are_stopped(recipe, tmp_path, ends):
    steps = []

    def yielding(state_dict):
        loss = bowl(state_dict)["loss"]
        for _ in range(4):
            steps.append(1)
            yield loss

    evaluate = {"function": yielding, "given": "state_dict"}
    keep = "best 1 by score (lowest)"
    plain = search(
        recipe, str(tmp_path / "plain"), trials=12, evaluate=evaluate, keep=keep, **OPTIONS
    )
    assert len(steps) == 48
    pruned = search(
        recipe,
        str(tmp_path / "pruned"),
        trials=12,
        pruner="median",
        evaluate=evaluate,
        keep=keep,
        **OPTIONS,
    )
    assert len(steps) < 96
    states = [trial.state.name for trial in study_of(tmp_path / "pruned").trials]
    assert 0 < states.count("PRUNED") == 12 - len(pruned)
    assert len(plain) == 12
    assert all(result.scores for result in plain)


def test_a_failing_trial_does_not_stop_the_search(recipe, tmp_path, ends):
    def picky(state_dict):
        loss = bowl(state_dict)["loss"]
        if loss > 0.05:
            raise RuntimeError("too far")
        return loss

    with pytest.raises(distmerge.SweepFailed, match="too far"):
        search(recipe, str(tmp_path / "out"), trials=8, sampler="qmc", evaluate=picky, **OPTIONS)
    found = lines(tmp_path / "out")
    assert len(found) == 8
    assert 0 < sum(one["error"] is None for one in found) < 8
    states = [trial.state.name for trial in study_of(tmp_path / "out").trials]
    assert states.count("COMPLETE") == sum(one["error"] is None for one in found)


def test_every_part_of_the_space_is_proposed():
    space = Space(
        combinations={"of": ["a", "b", "c"], "size": "1..2"},
        grid={"merge_method": ["ties", "linear"], "dtype": [None, "float32"]},
        zip={"x.a": [1, 2], "x.b": [3, 4]},
        list=[{"seed": 1}, {"over": "model"}],
        sample={"over": {"n": {"min": 1, "max": 3, "integer": True}, "q": [[1], [2]]}},
        exclude=[{"merge_method": "ties", "seed": 1}],
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    found = [suggest(study.ask(), space) for _ in range(200)]
    assert {(s["x.a"], s["x.b"]) for s in found} == {(1, 3), (2, 4)}
    assert {s["n"] for s in found} == {1, 2, 3}
    assert {tuple(m["model"] for m in s["models"]) for s in found} == {
        ("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c")
    }  # fmt: skip
    assert {str(s["q"]) for s in found} == {"[1]", "[2]"}
    assert {s["dtype"] for s in found} == {None, "float32"}
    assert all(("seed" in s) != ("over" in s) for s in found)
    assert any(fits(space.exclude[0], s) for s in found), "rules are the search's matter"


def test_excluded_settings_are_not_evaluated(recipe, tmp_path, ends):
    recipe["exclude"] = [{"parameters.lambda": {"min": 0.5}}]
    results = search(
        recipe, str(tmp_path / "out"), trials=10, evaluate=bowl, sampler="random",
        keep="best 1 by loss", **OPTIONS,
    )  # fmt: skip
    assert 0 < len(results) < 10
    assert all(result.settings["parameters.lambda"] < 0.5 for result in results)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"evaluate": None}, "goes by scores"),
        (
            {"evaluate": {"perplexity": "text"}, "keep": "best 1 by score"},
            "'keep' goes by 'score', and the score of a text is its 'perplexity'",
        ),
        ({"sampler": "grid"}, "no sampler 'grid'"),
        ({"pruner": "wilcoxon"}, "no pruner 'wilcoxon'"),
        ({"storage": "nonsense://x"}, "study can't be kept"),
        ({"evaluate": lambda state_dict: {"a": 1}}, "no score 'score' .* among a"),
        ({"evaluate": lambda state_dict: float("nan")}, "returned nan"),
    ],
)
def test_mistakes_are_told_in_words(recipe, tmp_path, keys, words):
    with pytest.raises(RecipeError, match=words):
        search(
            recipe, str(tmp_path / "out"), trials=2, **{"evaluate": judging.norm, **OPTIONS, **keys}
        )


def test_a_path_that_leads_nowhere_is_told_at_once(recipe, tmp_path):
    recipe["sample"] = {"over": {"parameters.lamda": {"min": 0, "max": 1}}}
    with pytest.raises(RecipeError, match="lamda"):
        search(recipe, str(tmp_path / "out"), trials=2, evaluate=judging.norm, **OPTIONS)


def test_what_has_no_effect_is_told_once_and_refused_if_strict(recipe, tmp_path, ends):
    recipe["parameters"]["weight"] = [{"filter": "zz", "value": 2.0}, {"value": 1.0}]
    events = []
    options = {"trials": 3, "evaluate": bowl, "keep": "best 1 by loss", **OPTIONS}
    search(recipe, str(tmp_path / "out"), listener=events.append, **options)
    scored = [i for i, event in enumerate(events) if event.kind == "score"]
    while_trying = [e.data["text"] for e in events[: scored[-1]] if e.kind == "notice"]
    assert len([text for text in while_trying if "the filter 'zz'" in text]) == 1
    with pytest.raises(RecipeError, match="no effect on these models") as refused:
        search(recipe, str(tmp_path / "strict"), strict=True, **options)
    assert any("the filter 'zz'" in fact for fact in refused.value.facts)
    assert not list(tmp_path.glob("strict/**/*.safetensors"))


def test_a_search_that_lost_its_lease_keeps_no_further_result(recipe, tmp_path, ends):
    out, seen = tmp_path / "out", []

    def meanwhile(state_dict):
        seen.append(1)
        if len(seen) == 2:
            (out / ".distmerge" / "lease.json").unlink()  # as who takes over and ends does
        return bowl(state_dict)["loss"]

    with pytest.raises(distmerge.OutputLocked, match="lost its hold"):
        search(recipe, str(out), trials=4, evaluate=meanwhile, **OPTIONS)
    assert len(seen) == 2
    assert len(lines(out)) == 1
    assert not (out / "results.csv").exists()


@pytest.mark.full
def test_the_built_in_perplexity_is_told_on_the_way_and_trials_are_stopped(gpts, tmp_path):
    """Candidates beyond the base are far worse from the first windows on."""
    (tmp_path / "text.txt").write_text("the cat sat on a mat and then the dog ran " * 60)
    space = {
        "merge_method": "task_arithmetic",
        "base_model": gpts[0],
        "models": [{"model": gpts[1]}],
        "parameters": {"weight": 1.0},
        "sample": {"over": {"parameters.lambda": {"min": 0, "max": 60}}},
        "evaluate": {"perplexity": str(tmp_path / "text.txt"), "context": 8, "distances": False},
        "keep": "best 1 by perplexity",
    }
    results = search(space, str(tmp_path / "out"), trials=12, pruner="median", **OPTIONS)
    trials = study_of(tmp_path / "out").trials
    stopped = [trial for trial in trials if trial.state.name == "PRUNED"]
    whole = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert stopped
    assert len(whole) == len(results)
    most = max(len(trial.intermediate_values) for trial in whole)
    assert 10 <= most <= 42
    assert all(len(trial.intermediate_values) < most for trial in stopped)
    for trial in whole:
        assert trial.value == trial.intermediate_values[most - 1]


@pytest.mark.full
def test_trials_on_ray_are_stopped_too(recipe, tmp_path):
    recipe["list"] = [{"seed": n} for n in range(4)]
    evaluate = {"function": f"{JUDGING}:steps", "at_once": 2, "distances": False}
    results = search(
        recipe,
        str(tmp_path / "out"),
        trials=14,
        sampler="qmc",
        pruner="median",
        evaluate=evaluate,
        engine="ray",
        workers=2,
        allowed_mem="1GiB",
    )
    trials = study_of(tmp_path / "out").trials
    stopped = [trial for trial in trials if trial.state.name == "PRUNED"]
    assert stopped
    assert len(stopped) + len(results) == 14
    assert all(1 <= len(trial.intermediate_values) <= 4 for trial in trials)
    assert {result.score for result in results} == {
        trial.intermediate_values[3] for trial in trials if trial not in stopped
    }
