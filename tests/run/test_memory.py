"""Memory: what each process needs at most, against what it was allowed and what was planned."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from vocabulary.models import TEXTS, tokenizer

MiB = 1 << 20
MEASURED = Path(__file__).with_name("measured.py")

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="high-water marks are read from /proc"
)


@pytest.fixture
def place(tmp_path):
    """A folder for gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def write(folder: Path, shapes: Mapping[str, tuple[int, ...]], *, seed: int | None = None) -> str:
    """A bf16 checkpoint: of zeros, in a sparse file, or of a megabyte of numbers repeated."""
    header, at = {}, 0
    for key, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if seed is not None:
            random = torch.Generator().manual_seed(seed)
            chunk = torch.randn(MiB // 2 + 63, generator=random).bfloat16().view(torch.uint8)
            data = chunk.numpy().tobytes()
            for start in range(0, at, len(data)):
                file.write(data[: at - start])
        file.truncate(8 + len(text) + at)
    return str(folder)


@dataclass(frozen=True)
class Outcome:
    code: int
    peak: int
    """Bytes."""
    events: list[dict[str, Any]]
    said: str

    def event(self, kind: str) -> dict[str, Any]:
        (found,) = [event for event in self.events if event["event"] == kind]
        return found


def run(
    recipe: dict[str, Any], out: Path, allowed: str, *options: str, command: str = "merge"
) -> Outcome:
    """One merge, or sweep, in a process of its own."""
    text, peak = out.with_suffix(".json"), out.with_suffix(".peak")
    text.write_text(json.dumps(recipe))
    arguments = [command, str(text), str(out), "--allowed-mem", allowed, "--json", *options]
    done = subprocess.run(
        [sys.executable, MEASURED, peak, *arguments], capture_output=True, text=True, check=False
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return Outcome(done.returncode, int(peak.read_text()), events, done.stderr)


def recipe(method: str, models: list[str], **fields: Any) -> dict[str, Any]:
    named: list[dict[str, Any]] = [{"model": model} for model in models]
    for model in named if method in ("linear", "ties") else ():
        model["parameters"] = {"weight": 1.0}
    return {"merge_method": method, "models": named, **fields}


def large(total: int, largest: int, others: int) -> dict[str, tuple[int, ...]]:
    """Shapes of so many MiB in all, of which one tensor has `largest`."""
    each = (total - largest) * MiB // 2 // others // 4096
    shapes = {f"layers.{i}.weight": (each, 4096) for i in range(others)}
    return {"embed.weight": (largest * MiB // 2 // 4095, 4095), **shapes}


def check(found: Outcome, allowed: int) -> None:
    assert found.code == 0, found.said
    assert found.peak <= found.event("plan")["projected_mem"] <= allowed


@pytest.mark.full
def test_a_linear_merge_of_gigabytes_stays_within_its_memory(place):
    shapes = large(2048, 1024, 20)
    models = [write(place / str(i), shapes) for i in range(2)]
    found = run(recipe("linear", models), place / "out", "600MiB", "--workers", "2")
    check(found, 600 * MiB)
    assert found.event("plan")["bytes_out"] > 2000 * MiB


def test_ties_with_a_tensor_beyond_all_memory_stays_within_it(place):
    shapes = large(760, 620, 10)
    models = [write(place / str(i), shapes, seed=i) for i in range(3)]
    made = recipe("ties", models[1:], base_model=models[0], parameters={"density": 0.2})
    found = run(made, place / "out", "600MiB", "--workers", "2")
    check(found, 600 * MiB)


def small_tensors(place: Path) -> dict[str, Any]:
    """Many keys, each with a histogram for every model."""
    shapes = {f"layers.{i}.weight": (65,) for i in range(1000)}
    models = [write(place / str(i), shapes, seed=i) for i in range(5)]
    return recipe("ties", models[1:], base_model=models[0], parameters={"density": 0.5})


def small_tensors_over_the_model(place: Path) -> dict[str, Any]:
    return {**small_tensors(place), "over": "model"}


def gram_matrices(place: Path) -> dict[str, Any]:
    models = [write(place / str(i), large(300, 100, 5), seed=i) for i in range(3)]
    return recipe("model_stock", models[1:], base_model=models[0])


def whole_tensors(place: Path) -> dict[str, Any]:
    """A method that sees whole tensors, of which many are read together."""
    (place / "my.py").write_text(
        "import torch\n\ndef middle(models, **kw):\n"
        "    return torch.median(torch.stack(models), 0).values\n"
    )
    shapes = {f"layers.{i}.weight": (513, 1023) for i in range(70)}
    models = [write(place / str(i), shapes, seed=i) for i in range(3)]
    return recipe(f"{place}/my.py:middle", models)


def transposed_tensors(place: Path) -> dict[str, Any]:
    """Views that are not row by row in the file."""
    models = []
    for i in range(3):
        random = torch.Generator().manual_seed(i)
        stored = torch.randn(2049, 1023, generator=random).bfloat16()
        (place / str(i)).mkdir(parents=True)
        tensors = {f"layers.{n}.weight": (stored + n).t() for n in range(30)}
        torch.save(tensors, place / str(i) / "pytorch_model.bin")
        models.append(str(place / str(i)))
    return recipe("ties", models[1:], base_model=models[0], parameters={"density": 0.5})


@pytest.mark.parametrize(
    ("build", "more"),
    [
        (small_tensors, 0),
        # 130: enough to read twenty of them together
        pytest.param(whole_tensors, 130, marks=pytest.mark.full),
        pytest.param(small_tensors_over_the_model, 0, marks=pytest.mark.full),
        pytest.param(gram_matrices, 0, marks=pytest.mark.full),
        pytest.param(transposed_tensors, 0, marks=pytest.mark.full),
        pytest.param(transposed_tensors, 130, marks=pytest.mark.full),
    ],
)
def test_a_refusal_names_what_is_enough(place, build, more):
    made = build(place)
    refused = run(made, place / "out", "100MiB", "--workers", "2")
    assert refused.code == 2
    assert not (place / "out").exists()
    assert re.match(r"A worker would need \d+ MiB, and 100 MiB are allowed\.\n", refused.said)
    enough = re.search(r"Fix: --allowed-mem (\d+)MiB\n", refused.said)
    assert enough
    allowed = int(enough[1]) + more
    found = run(made, place / "out", f"{allowed}MiB", "--workers", "2")
    check(found, allowed * MiB)


@pytest.mark.full
def test_embeddings_stream_though_their_padding_is_a_mean(place):
    words = tokenizer(TEXTS["prose"], 290, [f"<{n}>" for n in range(1000)])
    rows, width = len(words), 32768
    shapes = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    models = [write(place / str(i), shapes, seed=i) for i in range(2)]
    for model in models:
        words.save_pretrained(model)
        (Path(model) / "config.json").write_text(json.dumps({"vocab_size": rows}))
    asked = {"source": "union", "pad_to_multiple_of": 128}
    made = recipe("linear", models, base_model=models[0], tokenizer=asked)
    refused = run(made, place / "out", "100MiB", "--workers", "2")
    assert "whole tensors 0 MiB" in refused.said
    enough = re.search(r"inputs (\d+) MiB\nFix: --allowed-mem (\d+)MiB\n", refused.said)
    assert enough, refused.said
    assert int(enough[1]) * MiB < rows * width * 2 // 4
    found = run(made, place / "out", f"{enough[2]}MiB", "--workers", "2")
    check(found, int(enough[2]) * MiB)

    out, *held = (place / name / "model.safetensors" for name in ("out", "0", "1"))
    with safe_open(out, "pt") as file, safe_open(held[0], "pt") as a, safe_open(held[1], "pt") as b:
        merged, first, second = (f.get_slice("model.embed_tokens.weight") for f in (file, a, b))
        assert merged.get_shape() == [-(-rows // 128) * 128, width]
        for start in range(0, width, 8192):
            cut = slice(start, start + 8192)
            known = (first[:, cut].float() + second[:, cut].float()) / 2
            torch.testing.assert_close(merged[:rows, cut], known.bfloat16(), rtol=0, atol=0)
            mean = known.double().mean(0).bfloat16().expand(-rows % 128, -1)
            torch.testing.assert_close(merged[rows:, cut], mean, rtol=2**-7, atol=1e-6)


@pytest.mark.full
def test_workers_on_ray_stay_within_it_too(place):
    shapes = large(1000, 700, 10)
    models = [write(place / str(i), shapes) for i in range(2)]
    found = run(
        recipe("linear", models), place / "out", "640MiB", "--engine", "ray", "--workers", "2"
    )
    assert found.code == 0, found.said
    assert found.event("done")["peak_memory"] <= found.event("plan")["projected_mem"] <= 640 * MiB


@pytest.mark.full
def test_a_sweep_of_64_candidates_stays_within_it(place):
    shapes = large(24, 8, 4)
    models = [write(place / str(i), shapes, seed=i) for i in range(3)]
    made = recipe("ties", models[1:], base_model=models[0])
    made["grid"] = {
        "parameters.density": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
        "parameters.lambda": [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
    }
    found = run(made, place / "out", "700MiB", "--workers", "2", command="sweep")
    assert found.code == 0, found.said
    notices = [event["text"] for event in found.events if event["event"] == "notice"]
    passes = [re.match(r"pass 1 of (\d+), (\d+) candidates", text) for text in notices]
    ((count, members),) = [map(int, told.groups()) for told in passes if told]
    assert count > 1, "one pass for all of them needs more"
    assert members > 1
    assert found.peak <= 700 * MiB
    assert len(list((place / "out").glob("*/distmerge.json"))) == 64
