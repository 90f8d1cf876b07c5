"""Merge model checkpoints too big, too remote or too many for one machine.

    import distmerge

    base, legal = distmerge.open("gpt2"), distmerge.open("s3://bucket/legal")
    (base + 0.5 * (legal - base)).save("merged")                  streams, block by block

    distmerge.ties(["gpt2", "org/legal", "org/recipes"], k=0.2)   a pipeline
    distmerge.merge("recipe.yml", "merged", engine="ray")         on a cluster

Three ways to say what to merge (a recipe, a decorated function, arithmetic) become one expression;
a planner turns expression and headers into work units under a memory budget; one function runs a
unit, and engines differ only in where they call it. The folders, read in order, are that way:

    errors.py        what can go wrong, as a tree; credentials.py keeps secrets out of it
    checkpoints/     1 what is there: formats, headers, stores, which ranges to fetch together
    expressions/     2 what to compute: nodes, StateDict now and LazyStateDict later, calls, recipes
    methods/         3 how tensors combine: registry, decorators, reductions, one file per family
    plan/            4 who does what: memory model, shards, digest, the plan
    run/             5 doing it: one unit, the engines, the merge loop, events
    write/           6 what comes out: shards, index, config, card, manifest; reading it again
    sweeps/          7 many merges of the same models: the space of candidates, its plan, its run
    huggingface/     the bridge to transformers: pipelines and modules in and out
    importance.py    importances of parameters, estimated from a pipeline and data
    cli/, demo/      the command line; small real models to try it on

Nothing is imported before it is used, so that `import distmerge` and `distmerge --help` are quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distmerge.errors import (
        AccessDenied,
        CheckpointError,
        CheckpointNotFound,
        DistmergeError,
        DtypeMismatch,
        KeyMismatch,
        MalformedCheckpoint,
        MemoryBudgetError,
        MethodError,
        MismatchError,
        NonFiniteResult,
        OutputError,
        OutputExists,
        OutputLocked,
        ParameterError,
        ReadFailed,
        RecipeError,
        ShapeMismatch,
        SourceChanged,
        SweepFailed,
        UnknownMethod,
        VerificationFailed,
        WorkerLost,
    )
    from distmerge.expressions.fisher_call import fisher
    from distmerge.expressions.lazy import LazyStateDict
    from distmerge.expressions.lazy import open_lazy as open
    from distmerge.expressions.state_dict import StateDict
    from distmerge.importance import estimate_fisher, save_importance
    from distmerge.methods.agents import ram, ramplus_tl
    from distmerge.methods.cutoff import cutoff
    from distmerge.methods.declare import dict_map, layer_merge, model_merge
    from distmerge.methods.della import della, della_linear
    from distmerge.methods.examples import max_magnitude, median
    from distmerge.methods.linear import linear, passthrough
    from distmerge.methods.linear import linear as soup
    from distmerge.methods.method import PerModel
    from distmerge.methods.reductions import dots, largest, total
    from distmerge.methods.registry import find_method
    from distmerge.methods.sce import sce
    from distmerge.methods.spherical import karcher, multislerp, nuslerp, slerp
    from distmerge.methods.stock import model_stock
    from distmerge.methods.stock import model_stock as stock
    from distmerge.methods.swaps import arcee_fusion, nearswap
    from distmerge.methods.task_vectors import (
        breadcrumbs,
        breadcrumbs_ties,
        dare_linear,
        dare_ties,
        task_arithmetic,
        ties,
    )
    from distmerge.methods.task_vectors import dare_linear as dare
    from distmerge.methods.task_vectors import task_arithmetic as task
    from distmerge.methods.trim import keep_above
    from distmerge.run.merge import merge
    from distmerge.sweeps.run import sweep
    from distmerge.sweeps.search import search

__all__ = [
    "AccessDenied",
    "CheckpointError",
    "CheckpointNotFound",
    "DistmergeError",
    "DtypeMismatch",
    "KeyMismatch",
    "LazyStateDict",
    "MalformedCheckpoint",
    "MemoryBudgetError",
    "MethodError",
    "MismatchError",
    "NonFiniteResult",
    "OutputError",
    "OutputExists",
    "OutputLocked",
    "ParameterError",
    "PerModel",
    "ReadFailed",
    "RecipeError",
    "ShapeMismatch",
    "SourceChanged",
    "StateDict",
    "SweepFailed",
    "UnknownMethod",
    "VerificationFailed",
    "WorkerLost",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "cutoff",
    "dare",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "dict_map",
    "dots",
    "estimate_fisher",
    "find_method",
    "fisher",
    "karcher",
    "keep_above",
    "largest",
    "layer_merge",
    "linear",
    "max_magnitude",
    "median",
    "merge",
    "model_merge",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "open",
    "passthrough",
    "ram",
    "ramplus_tl",
    "save_importance",
    "sce",
    "search",
    "slerp",
    "soup",
    "stock",
    "sweep",
    "task",
    "task_arithmetic",
    "ties",
    "total",
]

_HOMES = {
    "LazyStateDict": "expressions.lazy",
    "PerModel": "methods.method",
    "StateDict": "expressions.state_dict",
    "arcee_fusion": "methods.swaps",
    "breadcrumbs": "methods.task_vectors",
    "breadcrumbs_ties": "methods.task_vectors",
    "cutoff": "methods.cutoff",
    "dare": "methods.task_vectors:dare_linear",
    "dare_linear": "methods.task_vectors",
    "dare_ties": "methods.task_vectors",
    "della": "methods.della",
    "della_linear": "methods.della",
    "dict_map": "methods.declare",
    "dots": "methods.reductions",
    "estimate_fisher": "importance",
    "find_method": "methods.registry",
    "fisher": "expressions.fisher_call",
    "karcher": "methods.spherical",
    "keep_above": "methods.trim",
    "largest": "methods.reductions",
    "layer_merge": "methods.declare",
    "linear": "methods.linear",
    "max_magnitude": "methods.examples",
    "median": "methods.examples",
    "merge": "run.merge",
    "model_merge": "methods.declare",
    "model_stock": "methods.stock",
    "multislerp": "methods.spherical",
    "nearswap": "methods.swaps",
    "nuslerp": "methods.spherical",
    "open": "expressions.lazy:open_lazy",
    "passthrough": "methods.linear",
    "ram": "methods.agents",
    "ramplus_tl": "methods.agents",
    "save_importance": "importance",
    "sce": "methods.sce",
    "search": "sweeps.search",
    "slerp": "methods.spherical",
    "soup": "methods.linear:linear",
    "stock": "methods.stock:model_stock",
    "sweep": "sweeps.run",
    "task": "methods.task_vectors:task_arithmetic",
    "task_arithmetic": "methods.task_vectors",
    "ties": "methods.task_vectors",
    "total": "methods.reductions",
}
"""Public name -> module, and its name there if that is another. Errors are in `errors`."""


def _load(name: str) -> Any:
    module, _, other = _HOMES.get(name, "errors").partition(":")
    return getattr(importlib.import_module(f"distmerge.{module}"), other or name)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("distmerge")
    if name not in __all__:
        raise AttributeError(f"module 'distmerge' has no attribute {name!r}.{_hint(name)}")
    globals()[name] = found = _load(name)
    return found


def _hint(name: str) -> str:
    """What may have been meant; nothing for what Python itself looks for."""
    if name.startswith("_"):
        return ""
    from difflib import get_close_matches

    near = get_close_matches(name, __all__, 1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return f"{meant} Methods of files and packages: distmerge.find_method('file.py:function')"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
