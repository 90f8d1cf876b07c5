"""Methods of a notebook's cells, in a real kernel, reach Ray's actors as code; cells run again with
something else in them are another merge."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from run.family import save_model
from run.merging import small_models

pytestmark = pytest.mark.full

DEFINE = """
import json
import ray
import torch
import distmerge

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)  # which the merges then use

SHARE = 0.25

def mean(tensors):
    return sum(tensors) / len(tensors)

@distmerge.dict_map
def mapped(models, scale=1.0):
    return mean(models) * SHARE * scale

@distmerge.layer_merge
def trimmed(models, base, *, density: float = 0.5):
    deltas = [model - base for model in models]
    cuts = yield [distmerge.cutoff(delta, keep=density) for delta in deltas]
    kept = [distmerge.keep_above(delta, cut) for delta, cut in zip(deltas, cuts)]
    return base + SHARE * mean(kept)

def judged(state_dict):
    return float(mean([state_dict["a"].abs().max()])) * SHARE

models = [distmerge.open(model) for model in json.loads(MODELS)]
ON_RAY = {"engine": "ray", "workers": 2}
"""
CALL = """
for name, merged in (("mapped", mapped(models, scale=2.0)), ("trimmed", trimmed(models))):
    here, there = merged.save(f"{name}-here"), merged.save(f"{name}-there", **ON_RAY)
    here, there = here.collect(), there.collect()
    assert all(torch.equal(here[key], there[key]) for key in here), name
"""
SWEEP = """
recipe = {
    "merge_method": "linear",
    "models": [{"model": m, "parameters": {"weight": 1.0}} for m in json.loads(MODELS)],
    "grid": {"models.0.parameters.weight": [0.1, 0.9]},
}
here, there = (
    [one.score for one in distmerge.sweep(recipe, out, evaluate=judged, **options)]
    for out, options in (("swept-here", {}), ("swept-there", ON_RAY))
)
assert here == there and None not in here and here[0] != here[1]
"""
AGAIN = """
{changed}
try:
    mapped(models, scale=2.0).save("mapped-there", **ON_RAY)
except distmerge.OutputExists:
    pass
else:
    raise AssertionError("taken for the merge before the change")
"""
CHANGES = {
    "a number": "SHARE = 0.5",
    "a function": "def mean(tensors):\n    return tensors[0]",
}


def run_cells(folder: Path, *cells: str) -> None:
    """Raises if one of them does."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()


def test_cells_run_on_ray(tmp_path, monkeypatch):
    for variable in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    models = [save_model(m, tmp_path / f"model{i}") for i, m in enumerate(small_models(3))]
    changed = [AGAIN.format(changed=change) for change in CHANGES.values()]
    run_cells(tmp_path, f"MODELS = {json.dumps(models)!r}", DEFINE, CALL, SWEEP, *changed)
