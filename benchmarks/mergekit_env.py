"""A virtual environment for mergekit: its requirements must not meet ours.

The benchmarks and tests/parity run mergekit from here. It is made once, in the temporary folder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

VERSION = "0.1.5"
PLACE = Path(tempfile.gettempdir(), "distmerge-benchmarks", f"mergekit-{VERSION}")
SHARED = ("torch", "transformers", "safetensors")
"""Packages of which mergekit runs on the versions that distmerge runs on here."""


def ensure_mergekit(folder: Path = PLACE) -> Path:
    """The `mergekit-yaml` to run: of the environment in `folder`, made if it isn't there.

    pip's own settings say where packages come from.

    Raises
        CalledProcessError: it can't be installed; whoever asks next tries again.
    """
    script = folder / "bin" / "mergekit-yaml"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not script.exists():  # pip writes it last: after everything that it needs
            _install(folder)
    return script


def _install(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    constraints = folder / "constraints.txt"
    pins = (f"{name}=={version(name).partition('+')[0]}" for name in SHARED)
    constraints.write_text("\n".join(pins) + "\n")
    pip: list[str | Path] = [folder / "bin" / "python", "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "-c", constraints, f"mergekit=={VERSION}"], check=True)


def versions(script: Path) -> str:
    """What the environment runs on, in words."""
    code = (
        "from importlib.metadata import version as v; "
        "print(', '.join(f'{n} {v(n)}' for n in ('mergekit', 'torch', 'transformers')))"
    )
    python = script.parent / "python"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()
