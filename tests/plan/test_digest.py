"""The digest changes with all that the output's bytes depend on, and with nothing else."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from methods.trees import apply, leaf

from distmerge.checkpoints.tensors import Checkpoint, FileInfo, TensorInfo
from distmerge.errors import RecipeError
from distmerge.expressions.nodes import Binary, Leaf, Select
from distmerge.methods.declare import layer_merge
from distmerge.methods.parameters import Filtered, Gradient
from distmerge.plan.digest import LONGEST_SPELLING, canonical, digest_of, kernel_class


def checkpoint(tag, place="/models/a", name="model"):
    infos = {f"k{i}": TensorInfo("F32", (2,), "m", 8 * i, 8 * i + 8) for i in range(5)}
    return Leaf.of(Checkpoint(place, place, infos, {"m": FileInfo("m", 40, tag)}), name)


A, B, C = (checkpoint(tag) for tag in "abc")
ROOT = apply("ties", [A, B], C, parameters={"weight": [1.0, 0.5], "density": Gradient((0.2, 1))})


def digest(root=ROOT, *, seed=0, headers=(b"one", b"two"), kernel="cpu", donor=A):
    return digest_of(root, seed=seed, headers=headers, kernel=kernel, donor=donor)


def other_method(models, base, **kw):
    return base


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"headers": (b"one", b"three")},
        {"headers": (b"one",)},
        {"kernel": "other"},
        {"donor": B},
        {"donor": None},
        {"root": replace(ROOT, base=B)},
        {"root": replace(ROOT, inputs=(("models", (B, A)),))},
        {"root": replace(ROOT, parameters=(("weight", (1.0, 0.6)),))},
        {"root": replace(ROOT, parameters=(("weight", Filtered((("mlp", 1.0),))),))},
        {"root": replace(ROOT, on_missing="base")},
        {"root": replace(ROOT, passthrough=frozenset({"head"}))},
        {"root": replace(ROOT, base_index=1)},
        {"root": replace(ROOT, base_listed=True)},
        {"root": replace(ROOT, method=layer_merge(name="ties")(other_method))},
        {"root": Binary("+", ROOT, 0.0)},
        {"root": Select(ROOT, frozenset({"k1"}))},
        {"root": Select(ROOT, frozenset({"k1", "k2"}))},
    ],
    ids=lambda changed: str(next(iter(changed))),
)
def test_what_the_bytes_depend_on(changed):
    assert digest(**changed) != digest()


def test_operators_their_sides_and_their_policy():
    nodes = [
        *(Binary(sign, A, B) for sign in "+-*/"),
        Binary("-", B, A),
        Binary("-", A, 2.0),
        Binary("-", 2.0, A),
        Binary("-", A, B, "common"),
        Select(A, frozenset({"k1"})),
        Select(A, frozenset({"k2"})),
    ]
    assert len({digest(node) for node in nodes}) == len(nodes)


def test_names_and_places_do_not_matter():
    """The same bytes on another host's disk, or under another name."""
    moved = checkpoint("a", "s3://bucket/copy", "copy")
    assert digest(Binary("+", A, 1.0)) == digest(Binary("+", moved, 1.0))
    assert digest(Binary("+", A, 1.0)) != digest(Binary("+", B, 1.0))


def test_tensors_in_memory_count_by_what_they_hold():
    x = torch.arange(6.0).view(2, 3)
    same, other = leaf({"w": x.clone()}, "other name"), leaf({"w": x + 1})
    assert digest(leaf({"w": x})) == digest(same) != digest(other)
    assert digest(leaf({"w": x.view(3, 2)})) != digest(same)
    assert digest(leaf({"w": x.t().contiguous().t()})) == digest(same)
    assert digest(leaf({"v": x})) != digest(same)
    assert digest(leaf({"w": x.bfloat16()})) != digest(same)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from plan.test_digest import ROOT, Select, canonical, digest, replace
keys = frozenset(f"k{i}" for i in range(20))
print(canonical(Select(replace(ROOT, passthrough=keys), keys)), digest(), sep="\\n")
"""


def test_every_process_finds_the_same_digest():
    """Whatever its seed for hashing: sets have no order of their own."""
    tests = os.path.dirname(os.path.dirname(__file__))
    found = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT, tests],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert found.pop().splitlines()[1] == digest()


def test_canonical_text_holds_no_places():
    assert "/models" not in canonical(ROOT)
    assert "model" not in canonical(Binary("+", A, B))


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="There is no cuda device here"):
        kernel_class("cuda")


def test_the_kernel_class_names_what_bits_depend_on():
    name = kernel_class("cpu")
    assert torch.backends.cpu.get_cpu_capability() in name
    assert ".".join(torch.__version__.split(".")[:2]) in name
    assert name.split()[-1] in ("fused", "plain")


def test_the_spelling_of_methods_within_methods_stays_short():
    nested = {0: A}
    for depth in range(1, 60):
        nested[depth] = apply("linear", [nested[depth - 1], B], parameters={"weight": [1.0, 1.0]})
    assert len(canonical(nested[59])) < 4 * LONGEST_SPELLING
    assert canonical(nested[59]) != canonical(nested[58])
