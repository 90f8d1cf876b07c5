"""What is decided from headers alone, before anything is read."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import distmerge
from distmerge.errors import DtypeMismatch, RecipeError
from distmerge.expressions.lazy import as_lazy
from distmerge.methods.declare import layer_merge
from distmerge.plan.memory import MiB, fitted
from distmerge.plan.plan import Plan
from distmerge.run.merge import plan


def saved(tensors: dict[str, Tensor], folder: Path, **config: Any) -> str:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def in_file(folder: Path, *shaped: tuple[str, str, list[int]]) -> str:
    """A sparse file whose tensors lie in this order, whatever their names."""
    header: dict[str, Any] = {}
    at = 0
    for key, dtype, shape in shaped:
        size = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "F8_E4M3": 1}[dtype]
        nbytes = size * torch.Size(shape).numel()
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return str(folder)


def linear(*models: str, **fields: Any) -> dict[str, Any]:
    named = [{"model": model} for model in models]
    return {
        "merge_method": "linear",
        "models": named,
        "parameters": {"weight": 1.0},
        **fields,
    }


MIXED = (("z", "F32", [4, 3]), ("a", "BF16", [7]), ("m", "F64", [2]), ("ids", "I64", [5]))


@pytest.fixture
def mixed(tmp_path: Path) -> list[str]:
    other = tuple((key, "F16" if dtype == "BF16" else dtype, shape) for key, dtype, shape in MIXED)
    return [in_file(tmp_path / "first", *MIXED), in_file(tmp_path / "second", *reversed(other))]


def test_keys_come_in_the_donors_order(mixed):
    assert list(plan(linear(*mixed)).weight_map) == ["z", "a", "m", "ids"]
    assert list(plan(linear(*mixed[::-1])).weight_map) == ["ids", "m", "a", "z"]
    ties = {**linear(mixed[0]), "merge_method": "ties", "base_model": mixed[1]}
    assert list(plan(ties).weight_map) == ["ids", "m", "a", "z"]


def test_dtypes_are_out_dtype_else_dtype_else_the_donors(mixed):
    own = {"z": "F32", "a": "BF16", "m": "F64", "ids": "I64"}
    assert plan(linear(*mixed)).dtypes == own
    assert plan(linear(*mixed[::-1])).dtypes == {**own, "a": "F16"}
    half = {"z": "F16", "a": "F16", "m": "F16", "ids": "I64"}
    brain = {"z": "BF16", "a": "BF16", "m": "BF16", "ids": "I64"}
    assert plan(linear(*mixed, dtype="float16")).dtypes == half
    assert plan(linear(*mixed, dtype="float16", out_dtype="bfloat16")).dtypes == brain
    assert plan(linear(*mixed, out_dtype="bfloat16"), out_dtype="float16").dtypes == half


def test_headers_sizes_and_offsets_are_exact_before_the_first_byte(mixed, tmp_path):
    decided = plan(linear(*mixed), max_shard_size=100)
    distmerge.merge(linear(*mixed), str(tmp_path / "out"), max_shard_size=100)
    assert [unit.shard for unit in decided.units] == sorted(
        p.name for p in (tmp_path / "out").glob("model-*")
    )
    for unit in decided.units:
        data = (tmp_path / "out" / unit.shard).read_bytes()
        assert unit.size == len(data)
        assert data.startswith(unit.header)
        length = 8 + int.from_bytes(data[:8], "little")
        places = json.loads(data[8:length])
        with safe_open(tmp_path / "out" / unit.shard, "pt") as opened:
            for task in unit.tasks:
                stored = opened.get_slice(task.program.key)
                assert (tuple(stored.get_shape()), stored.get_dtype()) == (task.shape, task.dtype)
                assert task.offset == length + places[task.program.key]["data_offsets"][0]
    assert decided.nbytes == sum(u.size - len(u.header) for u in decided.units) == 48 + 14 + 16 + 40
    assert decided.bytes_in == 2 * decided.nbytes


def test_shards_depend_on_the_size_alone(mixed):
    layouts = [
        [(unit.shard, [task.program.key for task in unit.tasks]) for unit in decided.units]
        for decided in (
            plan(linear(*mixed), max_shard_size=70, workers=1),
            plan(linear(*mixed), max_shard_size="70", workers=3, allowed_mem="1GiB"),
            plan(linear(*mixed), max_shard_size=70, engine="ray", workers=5),
        )
    ]
    assert layouts[0] == layouts[1] == layouts[2]
    assert [keys for _, keys in layouts[0]] == [["z", "a"], ["m", "ids"]]


def test_a_lone_shard_is_staged_and_several_are_not(mixed):
    (unit,) = plan(linear(*mixed)).units
    decided = plan(linear(*mixed))
    assert unit.shard == "model.safetensors"
    assert unit.path == f".distmerge/{decided.digest}/model.safetensors"
    assert all(u.path == u.shard for u in plan(linear(*mixed), max_shard_size=70).units)


def digest(what: Any, **options: Any) -> str:
    found: Plan = plan(what, **options)
    return found.digest


def test_the_digest_knows_what_the_bytes_depend_on_and_nothing_else(mixed):
    plain = digest(linear(*mixed))
    same = (
        digest(linear(*mixed), workers=1),
        digest(linear(*mixed), engine="ray", workers=7),
        digest(linear(*mixed), allowed_mem="8GiB"),
        digest(distmerge.soup([distmerge.open(m) for m in mixed], weights=[1.0, 1.0])),
    )
    assert set(same) == {plain}
    other = (
        digest(linear(*mixed[::-1])),
        digest(linear(*mixed), seed=1),
        digest(linear(*mixed), out_dtype="float16"),
        digest(linear(*mixed), max_shard_size=70),
        digest(linear(*mixed, parameters={"weight": 2.0})),
    )
    assert len({plain, *other}) == 6
    path = Path(mixed[0], "model.safetensors")
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + b"x")
    assert digest(linear(*mixed)) != plain


def test_another_seed_matters_only_if_it_is_another(mixed):
    assert digest(linear(*mixed), seed=0) == digest(linear(*mixed))


def test_units_carry_what_they_need_and_no_more(tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    for n, key in enumerate("ab", 1):
        save_file({key: torch.ones(30)}, folder / f"model-0000{n}-of-00002.safetensors")
    index = {key: f"model-0000{n}-of-00002.safetensors" for n, key in enumerate("ab", 1)}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    decided = plan(distmerge.open(folder) * 2, max_shard_size=100)
    first, second = decided.units
    assert [set(source.files) for source in first.sources.values()] == [{index["a"]}]
    assert [set(source.files) for source in second.sources.values()] == [{index["b"]}]
    assert first.bytes_in == second.bytes_in == 120


def test_dicts_in_memory_are_inputs_like_others(mixed):
    extra = {"z": torch.ones(4, 3), "a": torch.ones(7), "m": torch.ones(2), "ids": torch.arange(5)}
    decided = plan(
        distmerge.open(mixed[0]).subset(["z", "a", "m"]) + as_lazy(extra).subset(["z", "a", "m"])
    )
    assert set(decided.weight_map) == {"z", "a", "m"}
    (unit,) = decided.units
    assert all(isinstance(task.inputs[1], Tensor) for task in unit.tasks)


def test_what_asks_about_the_whole_model_is_known_beforehand(mixed):
    opened = [distmerge.open(model).subset(["z", "a", "m"]) for model in mixed]
    assert not plan(distmerge.ties(opened, k=0.5)).asks_model
    assert plan(distmerge.ties(opened, k=0.5, over="model")).asks_model
    assert plan(2 * distmerge.ties(opened, k=0.5, over="model") - opened[0]).asks_model


def test_a_claim_of_blocks_that_is_not_true_is_found_while_planning(mixed):
    @layer_merge(blocks="elements")
    def centred(models):
        return models[0] - models[0].mean()

    opened = [distmerge.open(model).subset(["z"]) for model in mixed]
    with pytest.raises(distmerge.MethodError, match="centred says that it works on blocks"):
        plan(centred(opened))


def test_a_method_that_sees_whole_tensors_is_refused_with_the_size(tmp_path):
    @layer_merge
    def first(models):
        return models[0]

    big = [in_file(tmp_path / str(i), ("w", "BF16", [40_000, 25_000])) for i in range(2)]
    with pytest.raises(distmerge.MemoryBudgetError) as refused:
        plan(first([distmerge.open(model) for model in big]))
    text = str(refused.value)
    assert "whole tensors 30,518 MiB" in text  # (3 x 2 + 2) x 4 bytes x 10**9
    assert "blocks=True" in text
    assert plan(distmerge.soup([distmerge.open(model) for model in big])).memory.gathered == 0


def test_eight_bit_floats_without_their_scale_are_refused_by_name(tmp_path):
    tensors = [("w", "F8_E4M3", [8, 8]), ("v", "F8_E4M3", [8, 8]), ("v_scale", "F32", [1])]
    models = [in_file(tmp_path / str(i), *tensors) for i in range(2)]
    with pytest.raises(DtypeMismatch, match="w is F8_E4M3"):
        plan(linear(*models))


def test_models_without_a_common_key_have_no_merge(tmp_path):
    one = in_file(tmp_path / "one", ("a", "F32", [2]))
    two = in_file(tmp_path / "two", ("b", "F32", [3]))
    with pytest.raises(RecipeError, match="share no key"):
        plan(linear(one, two, on_missing="common"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"engine": "spark"}, "no engine 'spark'"),
        ({"workers": 0}, "needs a worker"),
        ({"workers": 10**400}, "no use for 1000"),
        ({"seed": -1}, "seed can't be"),
        ({"seed": 1 << 64}, "seed can't be"),
        ({"allowed_mem": "lots"}, "'lots' is not a size"),
        ({"max_shard_size": -1}, "too small"),
        ({"out_dtype": "float7"}, "float7"),
    ],
)
def test_options_that_make_no_sense_are_refused(mixed, options, match):
    with pytest.raises(RecipeError, match=match):
        plan(linear(*mixed), **options)


def test_many_small_tensors_are_one_unit(tmp_path):
    shaped = [(f"layers.{i}.weight", "BF16", [3, 5]) for i in range(20_000)]
    models = [in_file(tmp_path / str(i), *shaped) for i in range(2)]
    decided = plan(distmerge.soup([distmerge.open(model) for model in models]))
    assert len(decided.weight_map) == 20_000
    assert len(decided.units) == 1


def test_a_worker_that_holds_more_than_was_planned_makes_up_for_it(mixed):
    planned = plan(linear(*mixed), allowed_mem="2GiB").memory
    memory = replace(planned, allowed=planned.projected)
    assert fitted(memory, memory.reserved) == memory
    assert fitted(memory, memory.reserved - MiB) == memory
    found = fitted(memory, memory.reserved + MiB)
    assert (found.arena, found.projected) == (memory.arena - MiB, memory.projected)
    spare = memory.arena - memory.least
    assert fitted(memory, memory.reserved + spare).arena == memory.least
    with pytest.raises(distmerge.MemoryBudgetError, match="before it merges") as refused:
        fitted(memory, memory.reserved + spare + MiB)
    enough = math.ceil((memory.allowed + MiB) / MiB) + 16
    assert f"--allowed-mem {enough}MiB" in str(refused.value)


def test_what_is_allowed_and_was_not_planned_makes_up_for_it_first(mixed):
    memory = plan(linear(*mixed), allowed_mem="2GiB").memory
    room = memory.allowed - memory.projected
    assert room > 0
    found = fitted(memory, memory.reserved + room)
    assert (found.arena, found.projected) == (memory.arena, memory.allowed)
    found = fitted(memory, memory.reserved + room + MiB)
    assert (found.arena, found.projected) == (memory.arena - MiB, memory.allowed)
