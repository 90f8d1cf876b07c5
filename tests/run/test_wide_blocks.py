"""Blocks are wide where the memory allows and the method gives the same bits at any width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run.family import same_tensors, save_model, tensors_at
from run.merging import least_memory

import distmerge
from distmerge.methods.blocks import BLOCK_ELEMENTS
from distmerge.run.merge import plan

SHAPE = (5_000, 1_027)
"""Some more than sixteen blocks, of rows that fill none exactly."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base and two fine-tunes in bfloat16."""
    random = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=random)
    tensors = [base, *(base + 0.05 * torch.randn(SHAPE, generator=random) for _ in range(2))]
    place = tmp_path_factory.mktemp("models")
    return [
        save_model({"w": x.bfloat16(), "b": x[0].bfloat16()}, place / str(i))
        for i, x in enumerate(tensors)
    ]


def opened(models: list[str]) -> list[Any]:
    """To be merged when it is asked for."""
    return [distmerge.open(path) for path in models]


def widths(what: object, memory: str) -> dict[str, int]:
    """By key, elements of a block."""
    decided = plan(what, allowed_mem=memory, workers=2)
    return {task.program.key: task.block for unit in decided.units for task in unit.tasks}


WIDE = 2 * (BLOCK_ELEMENTS // SHAPE[1]) * SHAPE[1]


def method(name: str, models: list[str], **options: Any) -> Any:
    return distmerge.find_method(name)(opened(models), **options)


@pytest.mark.usefixtures("fixed_reserve")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ties", {"k": 0.2}),
        ("ties", {"k": 0.2, "over": "model"}),
        ("model_stock", {}),
        ("karcher", {}),
        ("dare_ties", {"density": 0.5, "weight": 1.0}),
        ("della", {"density": 0.5, "epsilon": 0.1, "weight": 1.0}),
        ("sce", {"select_topk": 0.3}),
    ],
)
def test_the_bits_do_not_depend_on_it(
    models: list[str], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    what = method(name, models, **options)
    tight = least_memory(what, workers=2)
    assert widths(what, "2GiB") == {"w": WIDE, "b": BLOCK_ELEMENTS}
    assert widths(what, tight) == {"w": BLOCK_ELEMENTS, "b": BLOCK_ELEMENTS}
    for memory, workers in (("2GiB", 2), ("2GiB", 1), (tight, 2)):
        out = tmp_path / f"{memory}-{workers}"
        distmerge.merge(what, str(out), allowed_mem=memory, workers=workers)
    found = [tensors_at(path) for path in sorted(tmp_path.iterdir())]
    assert len(found) == 3
    assert not any(same_tensors(found[0], other) for other in found[1:])


@pytest.mark.usefixtures("fixed_reserve")
def test_what_writes_whole_blocks_between_its_steps_keeps_narrow_ones(models: list[str]) -> None:
    unique = method("ram", models)
    assert set(widths(unique, "2GiB").values()) == {BLOCK_ELEMENTS}
    mixed = 0.5 * method("ties", models, k=0.2) + 0.5 * unique
    assert set(widths(mixed, "2GiB").values()) == {BLOCK_ELEMENTS}
