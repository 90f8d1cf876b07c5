"""The walkthrough: what it shows is true, and it fails where merging doesn't pay."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import pickle
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import plain_merges
import pytest
import transformers
from cli.commands import call, start
from filelock import FileLock

from distmerge.demo import training, walkthrough
from distmerge.demo.perplexity import PerplexityRow
from distmerge.demo.training import DemoModels
from distmerge.errors import OutputExists

pytestmark = pytest.mark.full

NAMES = ("base", "law", "cooking")
MERGES = ("average", "ties")


class Walked(NamedTuple):
    folder: Path
    table: list[PerplexityRow]
    text: str


def with_models(trained_models: DemoModels, folder: Path) -> Path:
    """A folder in which the demo finds its models, so that it need not train."""
    shutil.copytree(trained_models.base.parent, folder / "models")
    return folder


@pytest.fixture(scope="module")
def walked(trained_models, shared_folder) -> Walked:
    """The demo, run once for all workers."""
    folder = shared_folder / "the demo's"
    kept = shared_folder / "walked.pickle"
    with FileLock(kept.with_suffix(".lock")):
        if not kept.exists():
            with contextlib.redirect_stdout(io.StringIO()) as text:
                table = walkthrough.run(with_models(trained_models, folder))
            kept.write_bytes(pickle.dumps((table, text.getvalue())))
    return Walked(folder, *pickle.loads(kept.read_bytes()))


@pytest.fixture(scope="module")
def pipes(walked) -> Mapping[str, transformers.Pipeline]:
    folders = {name: walked.folder / "models" / name for name in NAMES}
    folders |= {name: walked.folder / "merges" / f"{name}-ray" for name in MERGES}
    return {
        name: transformers.pipeline("text-generation", str(folder), device="cpu")
        for name, folder in folders.items()
    }


@pytest.fixture(scope="module")
def some_texts(trained_models) -> dict[str, list[str]]:
    return {domain: texts[:16] for domain, texts in trained_models.held_out.items()}


class TestClaim:
    def test_the_best_merge_beats_base_and_both_parents(self, walked):
        means = {row.name: sum(row.nats.values()) / 2 for row in walked.table}
        assert list(means) == [*NAMES, *MERGES]
        assert min(means[name] for name in MERGES) < min(means[name] for name in NAMES)

    def test_the_check_holds_for_the_merges(self, pipes, some_texts):
        assert walkthrough.shortfall(walkthrough.judge(pipes, some_texts)) is None

    @pytest.mark.parametrize("name", NAMES)
    def test_the_same_check_fails_for_what_is_no_merge(self, pipes, some_texts, name):
        swapped = {**pipes, **dict.fromkeys(MERGES, pipes[name])}
        assert str(walkthrough.shortfall(walkthrough.judge(swapped, some_texts))).startswith(
            "No merge reads the two domains better than "
        )


class TestSweep:
    def test_the_winner_beats_both_parents_on_both_domains_together(self, walked, pipes):
        (place,) = [path for path in (walked.folder / "sweep").iterdir() if path.is_dir()]
        winner = transformers.pipeline("text-generation", str(place), device="cpu")
        held_out = training.held_out_texts()
        rows = walkthrough.judge({**pipes, "winner": winner}, held_out)
        means = {row.name: row.mean for row in rows}
        assert means["winner"] < min(means["law"], means["cooking"])
        lines = (walked.folder / "sweep" / "results.jsonl").read_text().splitlines()
        scores = {one["name"]: one["scores"]["perplexity"] for one in map(json.loads, lines)}
        assert place.name == min(scores, key=lambda name: scores[name])
        assert scores[place.name] == pytest.approx(math.exp(means["winner"]), rel=1e-4)
        assert len(scores) == 3
        assert f"{place.name:11} {scores[place.name]:6.2f}  written" in walked.text


class TestMerges:
    def test_they_are_what_plain_torch_computes(self, walked, plain):
        base, parents = plain["base"], [plain["law"], plain["cooking"]]
        loaded = {
            name: plain_merges.parameters(walked.folder / "merges" / f"{name}-local")
            for name in MERGES
        }
        plain_merges.assert_close(loaded["average"], plain_merges.mean(parents))
        plain_merges.assert_merged(loaded["ties"], plain_merges.ties(base, parents, keep=0.2))

    @pytest.mark.parametrize("name", MERGES)
    def test_both_engines_wrote_the_same_bytes(self, walked, name):
        local, ray = (weights(walked.folder / "merges" / f"{name}-{e}") for e in ("local", "ray"))
        assert local == ray
        assert len(local) > 4
        other = next(merge for merge in MERGES if merge != name)
        assert local != weights(walked.folder / "merges" / f"{other}-local")


@pytest.fixture(scope="module")
def plain(trained_models):
    return {name: plain_merges.parameters(getattr(trained_models, name)) for name in NAMES}


def weights(folder: Path) -> dict[str, str]:
    files = folder.glob("*.safetensors")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class TestWhatIsShown:
    def test_a_row_for_each_model(self, walked):
        shown = {words[0]: words[1:] for words in map(str.split, table_of(walked.text)) if words}
        for row in walked.table:
            mean = sum(row.nats.values()) / 2
            numbers = [math.exp(n) for n in (row.nats["law"], row.nats["cooking"], mean)]
            assert shown[row.name][:3] == [f"{number:.2f}" for number in numbers]
        [best] = [name for name, words in shown.items() if words[-1:] == ["best"]]
        assert best == min(walked.table, key=lambda row: row.mean).name

    def test_what_each_model_writes(self, walked, pipes):
        after = walked.text.partition("transformers pipelines")[2].splitlines()
        for prompt in ("The appeal is dismissed, and the", "Bake at 200 degrees for"):
            first = after.index(f"  {prompt} ...") + 1
            for line, (name, pipe) in zip(after[first:], pipes.items(), strict=False):
                [answer] = pipe(prompt, min_new_tokens=12, max_new_tokens=24, do_sample=False)
                rest = " ".join(answer["generated_text"][len(prompt) :].split())
                assert line.split(maxsplit=2) == [name, "...", rest]

    def test_what_to_try_next_works(self, walked):
        tail = walked.text.partition("Try next:")[2].splitlines()
        commands = [shlex.split(line) for line in tail if line.strip()]
        assert len(commands) >= 4
        for program, *words in commands:
            assert program == "distmerge"
            found = call(*words)
            assert found.exit_code == 0, found.output
        assert (walked.folder / "merges" / "denser" / "config.json").exists()

    def test_nothing_is_trained_or_read_aloud_twice(self, walked):
        assert walked.text.count("trained before") == 1
        assert "step" not in walked.text


class TestFailures:
    def test_exit_code_1_and_one_sentence_where_merging_does_not_pay(
        self, trained_models, tmp_path
    ):
        folder = with_models(trained_models, tmp_path / "demo")
        for name in ("law", "cooking"):
            weights = "model.safetensors"
            shutil.copy(folder / "models/base" / weights, folder / "models" / name / weights)
        process = start("demo", folder)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 1
        assert "Try next" not in out
        told = [line for line in err.splitlines() if line.startswith("No merge ")]
        assert told == [
            "No merge reads the two domains better than base alone: "
            "the best is 0.000 nats per token behind."
        ]
        assert "Traceback" not in err

    def test_engines_that_disagree(self, walked, tmp_path):
        folder = tmp_path / "demo"
        shutil.copytree(walked.folder, folder)
        shard = next((folder / "merges" / "ties-ray").glob("model-00002-*"))
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        outputs = [folder / "merges" / f"ties-{engine}" for engine in ("local", "ray")]
        with pytest.raises(SystemExit, match="engines' weights differ"):
            walkthrough.compare(outputs)
        shard.unlink()
        with pytest.raises(SystemExit, match="engines' weights differ"):
            walkthrough.compare(outputs)

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "ties.yml").write_text("mine")
        with pytest.raises(OutputExists, match=r"(?s)something else.*Fix: distmerge demo"):
            walkthrough.run(tmp_path)
        assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]
        found = call("demo", tmp_path)
        assert found.exit_code == 2


def table_of(text: str) -> list[str]:
    return text.partition("Perplexity")[2].partition("Models, merges")[0].splitlines()[1:]
