"""The boundary between a recipe and the file, or the standard input, that it is read from."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from distmerge.credentials import redact
from distmerge.errors import RecipeError

LARGEST_RECIPE = 1_000_000
"""Characters."""


def is_text(source: str) -> bool:
    """Whether a string is YAML rather than a path."""
    if "\n" in source:
        return True
    if os.path.exists(os.path.expanduser(source)) or "://" in source.split(" ")[0]:
        return False
    looks_like_path = source.lower().endswith((".yml", ".yaml", ".json")) and ": " not in source
    return ":" in source and not looks_like_path


def file_text(name: str) -> str:
    """What a recipe's file says. Raises RecipeError: not there, no text, a directory."""
    path, shown = Path(os.path.expanduser(name)), redact(name)
    fix = "check the path, or give '-' to read the recipe from standard input"
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read(LARGEST_RECIPE + 1)
    except IsADirectoryError:
        raise RecipeError(
            f"{shown} is a directory, not a recipe.", fix="give a YAML file"
        ) from None
    except FileNotFoundError:
        where = f"looked in {Path.cwd()}"
        raise RecipeError(f"There is no recipe {shown!r}.", where, fix=fix) from None
    except UnicodeDecodeError as error:
        raise _not_text(shown, error) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{shown!r} can't be read.", str(error), fix=fix) from None


def standard_input() -> str:
    """What is piped in. Raises RecipeError: closed, no text."""
    try:
        if sys.stdin is None:  # Python's word for a closed one
            raise OSError("it is closed")
        return sys.stdin.read(LARGEST_RECIPE + 1)
    except UnicodeDecodeError as error:
        raise _not_text("standard input", error) from None
    except (OSError, ValueError) as error:
        fix = "name a YAML file, or write '< merge.yml' behind the command"
        raise RecipeError("standard input can't be read.", str(error), fix=fix) from None


def _not_text(shown: str, error: UnicodeDecodeError) -> RecipeError:
    return RecipeError(
        f"{shown} is not text.", f"byte {error.start} is not UTF-8", fix="give a YAML file"
    )
