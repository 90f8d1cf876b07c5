"""What is imported is required, and what is required is pinned."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INDIRECT = {
    "botocore": "s3fs",
    "click": "ray",
    "packaging": "transformers",
    "pydantic-core": "pydantic",
    "werkzeug": "flask",
}
"""Used here -> what brings it along, since the two have to fit."""


def required(*extras: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in found if r.name != "distmerge"}


def imported(folder: str) -> set[str]:
    """Distributions, by their canonical names, that the Python files below a folder import."""
    names = set()
    for path in (REPOSITORY / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    owners = packages_distributions()
    known = names - sys.stdlib_module_names
    return {canonicalize_name(owners[name][0]) for name in known if name in owners}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("distmerge", ["search"]), ("benchmarks", ["bench"]), ("tests", ["test", "bench", "search"])],
)
def test_what_is_imported_is_required(folder, extras):
    needed = imported(folder) - {"distmerge"}
    assert needed, "at least torch"
    assert needed - set(INDIRECT) <= set(required(*extras))
    assert {INDIRECT[name] for name in needed & set(INDIRECT)} <= set(required(*extras))


def test_what_ci_installs_is_pinned_within_its_range():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    for name, requirement in required("test", "bench", "search", "dev").items():
        assert pinned[name] in requirement.specifier, f"{requirement} and {name}=={pinned[name]}"
    assert pinned["torch"] == "2.13.0", "a local part such as +cpu names one index's build"
