"""How to run a merge, as commands and calls say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from distmerge.checkpoints.store import StorageOptions
from distmerge.errors import RecipeError
from distmerge.expressions.argument_kinds import checked, known_options
from distmerge.expressions.compute_pool import usable_cores

EngineName = Literal["local", "ray"]
DEFAULT_MEMORY = "2GiB"
MOST_WORKERS = 100_000


@dataclass(frozen=True)
class MergeOptions:
    """How to run a merge; none of it changes the tensors, but for dtype, seed and device."""

    engine: EngineName = "local"
    address: str | None = None
    """Of a Ray cluster to join; None starts one here."""
    workers: int | None = None
    """Threads of the local engine, actors of the Ray engine; default the usable cores, and on a
    cluster that is joined as many as there are units for."""
    allowed_mem: int | str = DEFAULT_MEMORY
    """Per worker process, interpreter and torch included."""
    max_shard_size: int | str | None = None
    out_dtype: str | None = None
    device: str = "cpu"
    seed: int | None = None
    overwrite: bool = False
    allow_non_finite: bool = False
    storage_options: StorageOptions | None = None
    pull_request: bool = False
    """On the Hub: propose the merge instead of putting it in place."""
    keep_intermediates: str | None = None
    """Directory or URL below which the named documents of a recipe are written too."""
    overrides: Sequence[str] = ()
    """`path.to.key=value` for recipes."""
    strict: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise RecipeError(f"A merge needs a worker, not {self.workers}.", fix="--workers 1")
        if self.workers is not None and self.workers > MOST_WORKERS:
            raise RecipeError(
                f"A merge has no use for {self.workers} workers.",
                f"{MOST_WORKERS:,} are the most",
                fix="leave --workers out: as many as there are cores",
            )

    @classmethod
    def of(cls, function: str, given: Mapping[str, Any], **own: Any) -> MergeOptions:
        """As a caller of `function` gave them. Raises ParameterError: there is no such option, or
        it, or one of the function's own, takes other values."""
        checked(function, own)
        known_options(function, given, [field.name for field in fields(cls)])
        return cls(**checked(function, given))

    @property
    def replaces(self) -> bool:
        """May the output hold a model already? A pull request doesn't touch it."""
        return self.overwrite or self.pull_request

    @property
    def processes(self) -> int:
        """Worker processes: the local engine's threads share one."""
        return 1 if self.engine == "local" else self.workers or usable_cores()

    @property
    def threads(self) -> int:
        """Threads in each worker process."""
        return (self.workers or usable_cores()) if self.engine == "local" else 1
