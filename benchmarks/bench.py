"""What rows share: where things are, and how a merge is run and measured."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

from benchmarks.machine import REPOSITORY
from benchmarks.mergekit_env import VERSION, ensure_mergekit
from benchmarks.models import family, weight_bytes
from benchmarks.shapes import BILLION, SMALL, ModelShape
from benchmarks.tools import CommandFailed, Usage, measure, plain_copy

DISTMERGE = (sys.executable, "-m", "distmerge.cli")
_UNSYNCED = REPOSITORY / "benchmarks" / "unsynced"
REST = 1.0
"""Seconds."""
_QUIET = {
    # As where it was installed: modules that are imported once are compiled for good.
    "PYTHONDONTWRITEBYTECODE": "",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Bench:
    """One run of the benchmarks."""

    work: Path
    """Directory for models, outputs and logs."""
    small: bool
    runs: int
    mergekit: Path | None
    """Script to run; None to leave mergekit out."""

    @property
    def shape(self) -> ModelShape:
        """Of the models that methods are compared on."""
        return SMALL if self.small else BILLION

    @cached_property
    def models(self) -> list[Path]:
        """A base and two fine-tunes of it."""
        return self.family(self.shape)

    def family(self, shape: ModelShape, tuned: int = 2) -> list[Path]:
        """Checkpoints of that shape, the base first."""
        return family(self.work / "inputs" / shape.name, shape, tuned)

    def write_recipe(self, name: str, text: str) -> Path:
        """A recipe as a file."""
        path = self.work / f"{name}.yml"
        path.write_text(text)
        return path

    def distmerge(
        self,
        *words: str | Path,
        synced: bool = True,
        cores: Collection[int] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Usage:
        """A distmerge command; without `synced`, it doesn't wait for the disk."""
        paths = [str(REPOSITORY)] if synced else [str(_UNSYNCED), str(REPOSITORY)]
        paths += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        full = {**_QUIET, "PYTHONPATH": os.pathsep.join(paths), **(env or {})}
        log = self.work / "distmerge.log"
        return measure([*DISTMERGE, *words], log=log, env=full, cores=cores)

    def merge(
        self,
        recipe: Path,
        *options: str,
        synced: bool = False,
        cores: Collection[int] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Usage:
        """A merge by distmerge into `self.out`, which must not be there."""
        words = ("merge", recipe, self.out, "--quiet", *options)
        return self.distmerge(*words, synced=synced, cores=cores, env=env)

    def mergekit_merge(self, recipe: Path) -> Usage:
        """The same by mergekit, as it comes."""
        assert self.mergekit is not None
        words: list[str | Path] = [self.mergekit, recipe, self.out, "--quiet"]
        return measure(words, log=self.work / "mergekit.log", env=_QUIET)

    @property
    def out(self) -> Path:
        """Where outputs go, one after the other."""
        return self.work / "out"

    def drop_output(self, nbytes: int) -> None:
        """Check that all was written, and remove it.

        Raises
            CommandFailed: more or less than that many bytes of tensors are there.
        """
        found = weight_bytes(self.out)
        if not 0.99 < found / nbytes < 1.01:
            raise CommandFailed(f"{found:,} bytes were written, not about {nbytes:,}")
        shutil.rmtree(self.out)
        self.rest()

    def rest(self) -> None:
        """Let the disk come to rest, so that no command pays for the one before it."""
        os.sync()
        time.sleep(REST)

    def clear(self) -> None:
        """Remove an output that a failed run may have left, and let the disk come to rest."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.rest()

    def copy(self, models: Iterable[Path], nbytes: int) -> float:
        """Seconds of the plain copy."""
        files = [file for model in models for file in sorted(model.glob("*.safetensors"))]
        return plain_copy(files, nbytes, self.work / "copy.tmp")

    def knows(self, method: str) -> bool:
        """Has distmerge that merge method?"""
        try:
            self.distmerge("methods", method)
        except CommandFailed:
            return False
        return True

    def say(self, text: str) -> None:
        """Tell whoever waits."""
        print(text, file=sys.stderr, flush=True)


def find_mergekit(work: Path, named: Path | None, *, skipped: bool) -> Path | None:
    """The script to run: the one that was named, or that of an environment of its own."""
    if skipped:
        return None
    if named is not None:
        return named.resolve()
    return ensure_mergekit(work / f"mergekit-{VERSION}")


def middle(values: Sequence[float]) -> float:
    """The median, to the millisecond."""
    return round(median(values), 3)
