"""Merge methods in the user's own code: `path/to/file.py:function`, `package.module:function`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from distmerge.errors import DistmergeError, UnknownMethod


def load_function(spelling: str) -> Any:
    """What `spelling` names.

    Raises
        UnknownMethod: no such file, module or name; or the file raises when it is run.
    """
    place, _, name = spelling.rpartition(":")
    module = _module_from_file(place) if place.endswith(".py") else _module_by_name(place)
    if not hasattr(module, name):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UnknownMethod(
            f"{place} defines no {name!r}.",
            f"it defines: {', '.join(functions)}",
            fix="check the name",
        )
    return getattr(module, name)


def travels_as_code(function: Any) -> None:
    """See to it that a function is pickled by value, with the functions beside it, if workers
    can't be expected to import its module: one that lies in a folder, and isn't installed."""
    name = str(getattr(function, "__module__", None) or "").partition(".")[0]
    # A notebook's cells and a script travel by value anyhow.
    if name not in ("", "__main__", "distmerge") and name in sys.modules and not _installed(name):
        cloudpickle.register_pickle_by_value(sys.modules[name])


@functools.lru_cache(maxsize=256)
def _installed(name: str) -> bool:
    """Does a top-level module belong to Python, or to a package that pip knows of?"""
    file = getattr(sys.modules[name], "__file__", None)
    if name in sys.stdlib_module_names or not file:
        return True
    homes = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    inside = any(Path(file).is_relative_to(home) for home in homes)
    return inside or name in importlib.metadata.packages_distributions()  # editable installs


def _module_from_file(place: str) -> ModuleType:
    path = Path(os.path.expanduser(place))
    if not os.path.isfile(path):
        raise UnknownMethod(f"There is no file {place}.", fix="give a path that exists here")
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()
    name = f"distmerge_user_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and inspect look modules up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UnknownMethod(
            f"{place} can't be run: {type(error).__name__}: {error}", fix=f"python {place}"
        ) from error
    # Workers don't have the file, so its functions travel as code.
    cloudpickle.register_pickle_by_value(module)
    return module


def _module_by_name(place: str) -> ModuleType:
    if not all(place.split(".")):
        raise UnknownMethod(
            f"{place!r} is no module.", fix="package.module:function, or path/to/file.py:function"
        )
    try:
        return importlib.import_module(place)
    except DistmergeError:  # of what it declares
        raise
    except (Exception, SystemExit) as error:
        lacks = isinstance(error, ImportError)
        raise UnknownMethod(
            f"Module {place!r} can't be imported: {type(error).__name__}: {error}",
            fix="install it, or give a path ending in .py" if lacks else f"python -m {place}",
        ) from error
