"""A candidate in memory, as its evaluator wants it: nothing of it is written but small files.

A state dict is lazy, and reads what is asked of it. A model or pipeline is merged into memory as a
whole; `held_bytes` says how much of it that takes, beside the merge itself.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from distmerge.errors import MemoryBudgetError, RecipeError
from distmerge.expressions.lazy import LazyStateDict
from distmerge.expressions.request import MergeRequest
from distmerge.expressions.settings import Settings
from distmerge.expressions.state_dict import StateDict
from distmerge.huggingface.from_folder import model_from, pipeline_from
from distmerge.plan.eight_bit import CODES
from distmerge.plan.memory import BARE_LIMIT, MiB
from distmerge.plan.plan import Plan
from distmerge.plan.sizes import format_size
from distmerge.run.collect import collect
from distmerge.run.finish import other_files
from distmerge.sweeps.distances import distances
from distmerge.sweeps.evaluation import Given
from distmerge.write.local_output import LocalOutput

_ONE_BY_ONE = threading.RLock()
"""Merging takes all cores anyhow, and as much memory as is allowed; transformers loads under
settings of the whole process."""


class CandidateStateDict(LazyStateDict):
    """A candidate as a lazy state dict: with the dtypes and seed that it would be written with."""

    def __init__(self, request: MergeRequest, allowed_mem: int) -> None:
        super().__init__(
            request.root,
            donor=request.donor,
            seed=request.seed,
            storage_options=request.storage_options,
        )
        self._request = request
        self._allowed = allowed_mem

    def request(self) -> MergeRequest:
        """What would be merged."""
        return self._request

    def collect(self, keys: Iterable[str] | None = None) -> StateDict:
        """Stream the tensors, all or those of `keys`, into memory: the merge's own part of that
        stays within --allowed-mem, however many candidates are evaluated at a time. Raises as
        `LazyStateDict.collect`."""
        wanted = None if keys is None else list(dict.fromkeys(keys))
        if wanted is not None:
            self._check_known(wanted)
        with _ONE_BY_ONE:
            found = collect(self._request, wanted, allowed_mem=self._allowed)
        return StateDict(found if wanted is None else {key: found[key] for key in wanted})

    def _made(self, expression: Any, settings: Settings) -> Any:
        return LazyStateDict(
            expression,
            donor=settings.donor,
            seed=settings.seed,
            storage_options=settings.storage_options,
        )


@contextmanager
def materialised(
    plan: Plan, given: Given, merging: int, *, comparing: bool = False
) -> Iterator[tuple[Any, dict[str, float]]]:
    """The candidate of a plan as an evaluator is given it, and its distances from its parents if
    it is compared with them.

    merging: bytes that the merge itself may use.
    """
    if given == "state_dict":
        lazy = CandidateStateDict(plan.request, merging)
        with _ONE_BY_ONE:
            far = distances(plan, lazy.collect, merging) if comparing else {}
        yield lazy, far
        return
    with tempfile.TemporaryDirectory(prefix="distmerge-") as place:
        with _ONE_BY_ONE:
            output = LocalOutput(place)
            files, _ = other_files(plan, output)
            for path, data in files.items():
                output.write_bytes(path, data)
            tensors = collect(plan.request, allowed_mem=merging)

            def some(keys: list[str]) -> dict[str, Tensor]:
                return {key: tensors[key] for key in keys}

            far = distances(plan, some, merging) if comparing else {}
            model = model_from(Path(place), tensors)
            made = model if given == "model" else pipeline_from(Path(place), model)
            tensors.clear()
        del model
        yield made, far


def merging_bytes(
    plans: Sequence[Plan], given: Given, at_once: int, allowed: int, beside: int = 0
) -> int:
    """What the merge into memory may use, where so many candidates are in memory at a time, and so
    many bytes beside them.

    Raises
        MemoryBudgetError: it is less than the merge needs.
        RecipeError: a candidate is written in 8 bits, which models aren't evaluated in.
    """
    if given == "state_dict":
        return allowed - beside
    if any(CODES in plan.dtypes.values() for plan in plans):
        raise RecipeError(
            f"8-bit candidates can't be evaluated as a {given}.",
            fix="out_dtype: bfloat16, or evaluate: {..., given: state_dict}",
        )
    largest = max(plan.nbytes for plan in plans)
    held = held_bytes(largest, at_once) + beside
    least = least_merging(plans)
    if held + least > allowed:
        told = f"{at_once:,} candidates" if at_once > 1 else "a candidate"
        raise MemoryBudgetError(
            f"To evaluate {told} as a {given} takes {format_size(held + least)} of memory, and "
            f"{format_size(allowed)} are allowed.",
            f"a candidate has {format_size(largest)}, and is there twice while it is made",
            fix=f"--allowed-mem {-(-(held + least) // MiB) + 16}MiB"
            + (", or a smaller at_once" if at_once > 1 else "")
            + ", or an evaluator of a state_dict",
        )
    return allowed - held


def held_bytes(nbytes: int, at_once: int) -> int:
    """Memory of candidates of this size: one of them twice, while it is made."""
    return (at_once + 1) * nbytes


def least_merging(plans: Sequence[Plan]) -> int:
    """What merging a candidate needs in a process that holds other candidates."""
    fixed = 0
    for plan in plans:
        memory = plan.memory
        own = memory.projected - memory.arena + memory.least - memory.reserved - memory.sending
        fixed = max(fixed, own)
    return fixed + BARE_LIMIT
