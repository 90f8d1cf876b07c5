"""The shape of the package: who may import whom, and how long things may get."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run.family import save_model
from run.merging import small_models

PACKAGE = Path(__file__).parent.parent / "distmerge"

KERNELS = {
    f"methods/{kind}kernels.py"
    for kind in ("", "cutoff_", "mark_", "random_", "rank_", "raw_", "rounding_", "trim_")
}
BELOW: dict[str, set[str]] = {
    "credentials": set(),
    "errors": {"credentials"},
    "checkpoints": {"credentials", "errors"},
    "methods": {"errors"},
    "expressions": {"credentials", "errors", "checkpoints", "methods"},
    "write": {"credentials", "errors", "checkpoints"},
    "plan": {"credentials", "errors", "checkpoints", "methods", "expressions", "write"},
    "run": {"credentials", "errors", "checkpoints", "methods", "expressions", "write", "plan"},
    "sweeps": {
        "credentials",
        "errors",
        "checkpoints",
        "methods",
        "expressions",
        "write",
        "plan",
        "run",
    }
    | {"run", "huggingface"},
    "huggingface": {"credentials", "errors", "checkpoints"},
}
"""For each part, those that it builds on. The command line, the demo and `importance.py` stand on
everything."""

DOORS = {
    "a method called on models": {
        ("methods/method.py", "distmerge.expressions.calls"),
        ("methods/method.py", "distmerge.expressions.call_help"),
        ("methods/declare.py", "distmerge.expressions.model_calls"),
    },
    ".save and .collect": {
        ("expressions/lazy.py", "distmerge.run.merge"),
        ("expressions/lazy.py", "distmerge.run.collect"),
    },
    "names, modules and pipelines in and out": {
        ("expressions/arithmetic.py", "distmerge.huggingface"),
        ("expressions/fisher_call.py", "distmerge.huggingface"),
        ("expressions/kinds.py", "distmerge.huggingface"),
        ("expressions/state_dict.py", "distmerge.huggingface"),
    },
    "fisher without importances": {("expressions/fisher_call.py", "distmerge.importance")},
    "what transformers holds in another layout": {
        ("expressions/layouts.py", "distmerge.huggingface.layouts"),
    },
    "tokenizers of a recipe's vocabulary": {
        ("expressions/vocabularies.py", "distmerge.huggingface.tokenizers"),
    },
    "does the written model load": {("write/verify.py", "distmerge.huggingface")},
}
"""The imports that go up, by what they are for: (file, module)."""

HOMES = {
    "ray": {"run/ray_", "sweeps/ray_", "demo/walkthrough.py"},
    "fsspec": {"checkpoints/fsspec_store.py", "checkpoints/s3_objects.py"},
    "s3fs": {"checkpoints/fsspec_store.py"},
    "huggingface_hub": {
        "checkpoints/hub_account.py",
        "checkpoints/hub_errors.py",
        "checkpoints/hub_store.py",
        "huggingface/pipelines.py",
        "write/card.py",
        "write/hub_output.py",
        "write/hub_repository.py",
    },
    "transformers": {
        "demo/perplexity.py",
        "demo/training.py",
        "demo/walkthrough.py",
        "huggingface/from_folder.py",
        "huggingface/layouts.py",
        "huggingface/load_check.py",
        "huggingface/pipelines.py",
        "huggingface/state_dict.py",
        "huggingface/tasks.py",
        "huggingface/tokenizers.py",
    },
    "regex": {"checkpoints/renaming.py"},
    "jinja2": {"expressions/chat_templates.py"},
    "rich": {
        "cli/tables.py",
        "demo/sweeping.py",
        "demo/walkthrough.py",
        "plan/describe.py",
        "run/progress.py",
    },
    "typer": {"cli/"},
    "numba": {"methods/chunks.py", *KERNELS},
    "optuna": {"sweeps/trials.py"},
    "cloudpickle": {"methods/user_code.py", "run/ray_", "sweeps/evaluation.py", "sweeps/ray_"},
}
"""The files that may import a library: it is part of what they are for."""
AT_THE_TOP = {
    *((f"run/ray_{name}.py", "ray") for name in ("actors", "cluster", "engine")),
    *((f"run/ray_{name}.py", "ray") for name in ("meter", "metrics", "worker")),
    *((f"run/ray_{name}.py", "cloudpickle") for name in ("actors", "engine", "worker")),
    *(("sweeps/ray_scoring.py", name) for name in ("ray", "cloudpickle")),
    ("sweeps/ray_spool.py", "ray"),
    ("sweeps/evaluation.py", "cloudpickle"),
    ("methods/chunks.py", "numba"),
    *((kernels, "numba") for kernels in KERNELS),
    ("methods/user_code.py", "cloudpickle"),
}
"""Modules that are themselves imported late; and cloudpickle, which is small."""
LONGEST_MODULE, LONGEST_FUNCTION = 300, 60

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@functools.cache
def tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


def imports(file: str) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether that is as the file itself is imported.

    What stands under `if TYPE_CHECKING:` is never imported, and left out.
    """
    pending: list[tuple[ast.AST, bool]] = [(tree(file), True)]
    while pending:
        node, top = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            assert node.module is not None
            if node.module == "distmerge":
                yield from ((f"distmerge.{alias.name}", top) for alias in node.names)
            else:
                yield node.module, top
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        pending += [(child, top and not inside) for child in ast.iter_child_nodes(node)]


def part_of(file_or_module: str) -> str:
    return file_or_module.removeprefix("distmerge.").replace("/", ".").split(".")[0]


def upward() -> set[tuple[str, str, bool]]:
    """(file, module, at the top?) of every import of ours that isn't of a part below."""
    return {
        (file, module, top)
        for file in FILES
        for module, top in imports(file)
        if module.startswith("distmerge.")
        and part_of(file) in BELOW
        and part_of(module) not in BELOW[part_of(file)] | {part_of(file)}
    }


def test_imports_run_one_way_but_for_the_doors():
    doors = {door for kind in DOORS.values() for door in kind}
    assert {(file, module) for file, module, _ in upward()} == doors


def test_the_doors_are_opened_late():
    assert not [(file, module) for file, module, top in upward() if top]


def test_every_part_has_its_place():
    assert {part_of(file) for file in FILES} - set(BELOW) == {
        "__init__",
        "__main__",
        "cli",
        "demo",
        "importance",
    }


def test_nothing_below_the_command_line_imports_it():
    for file in FILES:
        if part_of(file) not in ("__main__", "cli", "demo"):
            assert not [m for m, _ in imports(file) if part_of(m) in ("cli", "demo")], file


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_by_its_own_files_alone(library):
    found = {
        (file, top) for file in FILES for m, top in imports(file) if m.split(".")[0] == library
    }
    homes = HOMES[library]
    assert {file for file, _ in found if not any(file.startswith(home) for home in homes)} == set()
    assert all(any(file.startswith(home) for file, _ in found) for home in homes)
    if library not in ("rich", "typer"):
        early = {(file, library) for file, top in found if top}
        assert early == {(file, lib) for file, lib in AT_THE_TOP if lib == library}


@pytest.mark.parametrize("module", ["ray_engine", "kernels", "raw_kernels"])
def test_modules_that_import_something_heavy_are_imported_late(module):
    importing = [
        (file, top)
        for file in FILES
        for m, top in imports(file)
        if m.endswith(f".{module}") or m == f"distmerge.methods.{module}"
    ]
    late = {file for file, top in importing if top}
    assert late <= {"methods/raw_kernels.py"}, "which is itself imported late"


def test_modules_and_functions_stay_short():
    long_modules = {
        file: lines
        for file in FILES
        if (lines := len((PACKAGE / file).read_text().splitlines())) > LONGEST_MODULE
    }
    assert long_modules == {}
    long_functions = {
        f"{file}:{node.name}": length
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and (length := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION
    }
    assert long_functions == {}


HEAVY = ("torch", "ray", "fsspec", "s3fs", "transformers", "huggingface_hub", "numba", "pydantic")


def loaded_after(code: str, *arguments: str) -> set[str]:
    """Which of the heavy libraries a fresh interpreter holds after running some code."""
    script = (
        f"import sys, json\n{code}\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_or_its_command_line_imports_nothing_heavy():
    assert loaded_after("import distmerge") == set()
    assert loaded_after("import distmerge.cli") == set()


def test_methods_and_expressions_need_torch_and_little_else():
    code = "import distmerge\ndistmerge.ties, distmerge.open, distmerge.merge, distmerge.StateDict"
    assert loaded_after(code) <= {"torch", "pydantic"}


def test_a_merge_on_this_machine_needs_neither_ray_nor_remote_stores(tmp_path):
    models = [save_model(m, tmp_path / str(i)) for i, m in enumerate(small_models(3))]
    code = (
        "import distmerge\n"
        "models = [distmerge.open(model) for model in sys.argv[2:]]\n"
        "distmerge.ties(models, k=0.5).save(sys.argv[1])"
    )
    found = loaded_after(code, str(tmp_path / "out"), *models)
    assert not found & {"ray", "fsspec", "s3fs", "transformers"}
