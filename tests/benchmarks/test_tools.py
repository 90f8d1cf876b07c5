"""What the benchmarks report is what happened: processes of known cost, files read by others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.models import family, linked, read_tensor, sparse_family, weight_files
from benchmarks.results import Check, Comparison, Curve, Ledger, Measured, Skipped
from benchmarks.shapes import TINY, ModelShape, experts, gpt2
from benchmarks.table import markdown
from benchmarks.tools import CommandFailed, measure, plain_copy

MB = 10**6


def test_memory_of_a_grandchild_that_nobody_waits_for(tmp_path: Path) -> None:
    hold = "import time; kept = b'x' * 300_000_000; print(flush=True); time.sleep(1.5)"
    start = (
        "import subprocess, sys, time; child = subprocess.Popen("
        f"[sys.executable, '-c', {hold!r}], stdout=subprocess.PIPE); child.stdout.readline()"
    )
    used = measure([sys.executable, "-c", f"{start}; time.sleep(1)"], log=tmp_path / "log")
    assert 300 * MB < used.peak < 400 * MB
    assert 1.0 <= used.seconds < 15


def test_processor_time_of_a_child_counts(tmp_path: Path) -> None:
    spin = "import time\nwhile time.process_time() < 0.4: pass"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
    used = measure([sys.executable, "-c", start], log=tmp_path / "log")
    assert 0.4 <= used.cpu < 2


def test_one_core_is_one_core(tmp_path: Path) -> None:
    ask = [sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"]
    assert measure(ask, log=tmp_path / "log", cores=[0]).output.strip() == "1"
    everything = measure(ask, log=tmp_path / "log").output.strip()
    assert everything == str(len(__import__("os").sched_getaffinity(0)))


def test_a_failure_shows_what_was_printed(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="exited with 3:\nwhy"):
        measure([sys.executable, "-c", "print('why'); exit(3)"], log=tmp_path / "log")


def test_a_command_without_end_is_ended(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="stopped after 1 s"):
        measure([sys.executable, "-c", "import time; time.sleep(60)"], log=tmp_path / "l", limit=1)


def test_plain_copy_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(3 * MB))
    assert plain_copy([tmp_path / "in"], 2 * MB + 1, tmp_path / "out") > 0
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return family(tmp_path_factory.mktemp("family"), TINY)


def _load(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


def test_fine_tunes_lie_near_their_base(models: list[Path]) -> None:
    base, a, b = map(_load, models)
    assert {key: tuple(tensor.shape) for key, tensor in base.items()} == dict(TINY.tensors)
    key = "model.layers.1.mlp.up_proj.weight"
    assert base[key].dtype == torch.bfloat16
    assert base[key].float().std() == pytest.approx(0.02, rel=0.05)
    deltas = [tuned[key].float() - base[key].float() for tuned in (a, b)]
    assert [delta.std().item() for delta in deltas] == pytest.approx([0.001] * 2, rel=0.1)
    together = torch.corrcoef(torch.stack([delta.flatten() for delta in deltas]))[0, 1]
    assert together == pytest.approx(0.6**2, abs=0.05)
    assert torch.equal(torch.from_numpy(read_tensor(models[1], key)), a[key].float().flatten())


def test_models_load_in_transformers(models: list[Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, told = AutoModelForCausalLM.from_pretrained(models[0], output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert loaded.num_parameters() == TINY.parameters
    assert AutoTokenizer.from_pretrained(models[0])("merge")["input_ids"] == [3]


def test_a_model_is_written_once_per_shape(tmp_path: Path) -> None:
    first = family(tmp_path, TINY, tuned=1)
    files = [file for model in first for file in weight_files(model)]
    before = [file.stat().st_mtime_ns for file in files]
    family(tmp_path, TINY, tuned=1)
    assert [file.stat().st_mtime_ns for file in files] == before
    family(tmp_path, ModelShape(TINY.name, TINY.tensors, "F32", 1, TINY.config), tuned=1)
    assert [file.name for file in weight_files(first[0])] == ["model.safetensors"]
    assert _load(first[0])["lm_head.weight"].dtype == torch.float32


def test_sparse_models_take_no_room(tmp_path: Path) -> None:
    shape = experts("moe", layers=1, experts_per_layer=4, shards=2)
    for folder in sparse_family(tmp_path, shape, models=2):
        files = weight_files(folder)
        assert sum(file.stat().st_size for file in files) > shape.nbytes
        assert sum(file.stat().st_blocks * 512 for file in files) < 100_000
        with safe_open(files[-1], "pt") as opened:
            assert opened.get_slice("lm_head.weight").get_shape() == [129280, 7168]


def test_links_are_the_same_files(models: list[Path], tmp_path: Path) -> None:
    copy = linked(models[0], models[0].parent / "linked")
    for file in weight_files(models[0]):
        assert (copy / file.name).samefile(file)


def test_sizes_of_the_named_models() -> None:
    assert gpt2().parameters == 124_439_808
    large = experts("moe", layers=61, experts_per_layer=544, shards=163)
    assert len(large.tensors) >= 100_000
    assert large.parameters == pytest.approx(671e9, rel=0.01)


FAST = Comparison(
    "ties", "ties, 3 x 1.1 B bf16", ours=5.0, synced=7.5, floor=1.25, peak=900 * MB, cpu=8.0,
    mergekit=150.0, mergekit_peak=6800 * MB, at_most=1 / 25,
)  # fmt: skip
SLOW = Comparison(
    "linear", "linear", ours=5.0, synced=6.0, floor=1.25, peak=900 * MB, cpu=8.0,
    mergekit=25.0, at_most=1 / 6, copies=3, note="the results differ: correlation 0.12",
)  # fmt: skip


def test_a_row_says_what_was_wanted_and_whether_it_was_met() -> None:
    text = markdown([Measured([FAST, SLOW], load=0.3, runs=3)], ["a machine"], None)
    row = next(line for line in text.splitlines() if line.startswith("| ties"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "ties, 3 x 1.1 B bf16", "5.00", "150.0", "30.0", "1.25", "4.0", "900", "6,800", "7.50",
        "1/25 of mergekit, 1,500 MB", "yes",
    ]  # fmt: skip
    assert "| 1/6 of mergekit, 3 copies, 1,500 MB | no |" in text
    assert "- linear: the results differ: correlation 0.12" in text


def test_too_much_memory_is_not_met() -> None:
    large = Comparison("x", "x", ours=1, synced=1, floor=1, peak=1600 * MB, cpu=1, copies=3)
    assert large.met is False


def test_results_are_found_again(tmp_path: Path) -> None:
    kept = Measured(
        [
            FAST,
            Check("help", "help", "0.4 s", "0.5 s", True),
            Curve("scaling", "models", "", [2, 3], [0.1, 0.2]),
            Skipped("7b", "7b", "no room"),
        ],
        load=1.5,
        commit="abc",
        runs=3,
    )
    Ledger(tmp_path / "results.json").record("all", kept)
    assert Ledger(tmp_path / "results.json").of(["none", "all"]) == [kept]
