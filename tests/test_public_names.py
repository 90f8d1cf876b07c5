"""What `import distmerge` offers, and how little it costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import distmerge
import distmerge.errors
from distmerge.expressions.recipe_words import MERGEKIT_METHODS

SOURCE = Path(distmerge.__file__)
NAMES = """
AccessDenied CheckpointError CheckpointNotFound DistmergeError DtypeMismatch KeyMismatch
LazyStateDict MalformedCheckpoint MemoryBudgetError MethodError MismatchError NonFiniteResult
OutputError OutputExists OutputLocked ParameterError PerModel ReadFailed RecipeError ShapeMismatch
SourceChanged StateDict SweepFailed UnknownMethod VerificationFailed WorkerLost arcee_fusion
breadcrumbs breadcrumbs_ties cutoff dare dare_linear dare_ties della della_linear dict_map dots
estimate_fisher find_method fisher karcher keep_above largest layer_merge linear max_magnitude
median merge model_merge model_stock multislerp nearswap nuslerp open passthrough ram ramplus_tl
save_importance sce search slerp soup stock sweep task task_arithmetic ties total
"""
PUBLIC = NAMES.split()


def run(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_these_are_the_public_names():
    assert distmerge.__all__ == PUBLIC == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(distmerge))


@pytest.mark.parametrize("name", PUBLIC)
def test_each_is_there_and_documented(name):
    found = getattr(distmerge, name)
    if name != "PerModel":
        assert inspect.getdoc(found)


def test_every_error_is_public():
    errors = {
        name
        for name, value in vars(distmerge.errors).items()
        if isinstance(value, type) and issubclass(value, distmerge.DistmergeError)
    }
    assert errors <= set(PUBLIC)


def test_type_checkers_see_what_is_loaded():
    """Each name is imported under TYPE_CHECKING from where it is loaded at run time."""
    tree = ast.parse(SOURCE.read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == PUBLIC
    for public, (module, name) in seen.items():
        assert getattr(distmerge, public) is getattr(sys.modules[module], name)


def test_importing_it_imports_nothing_heavy():
    heavy = ("torch", "numpy", "transformers", "ray", "fsspec", "huggingface_hub", "pydantic")
    code = f"import sys, distmerge; print([m for m in {heavy!r} if m in sys.modules])"
    assert run(code).strip() == "[]"


def test_state_dicts_need_neither_transformers_nor_ray_nor_a_remote_store():
    code = (
        "import sys, distmerge, torch\n"
        "sd = distmerge.StateDict(a=torch.ones(2))\n"
        "distmerge.ties([sd, sd * 2, sd * 3], k=0.5)\n"
        "heavy = ('transformers', 'ray', 'fsspec', 'huggingface_hub', 's3fs')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert run(code).strip() == "[]"


def test_names_that_modules_have_too_stay_the_methods():
    code = (
        "import distmerge\n"
        "import distmerge.importance\n"
        "from distmerge.importance import estimate_fisher\n"
        "from distmerge import fisher\n"
        "assert fisher is distmerge.fisher and callable(fisher)\n"
        "assert distmerge.estimate_fisher is estimate_fisher\n"
    )
    run(code)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="merge_all"):
        distmerge.merge_all  # noqa: B018
    assert distmerge.__version__


@pytest.mark.parametrize(
    ("wrong", "meant"), [("dare_tise", "dare_ties"), ("lineer", "linear"), ("serch", "search")]
)
def test_misspelt_names_are_told_the_nearest(wrong, meant):
    with pytest.raises(AttributeError, match=f"Did you mean '{meant}'"):
        getattr(distmerge, wrong)
    assert not hasattr(distmerge, wrong)
    with pytest.raises(AttributeError, match=r"find_method\('file.py:function'\)"):
        distmerge.zzz  # noqa: B018


@pytest.mark.parametrize("name", sorted(MERGEKIT_METHODS))
def test_every_method_of_the_recipe_language_is_a_call(name):
    assert getattr(distmerge, name) is distmerge.find_method(name)


def test_the_tour_names_every_part_of_the_package():
    parts = {
        path.name + ("/" if path.is_dir() else "")
        for path in SOURCE.parent.iterdir()
        if not path.name.startswith(("_", ".")) and path.name != "py.typed"
    }
    assert [part for part in sorted(parts) if part not in (distmerge.__doc__ or "")] == []
