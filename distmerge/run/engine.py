"""The seam between the merge and where its units run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from distmerge.expressions.evaluate import Place
from distmerge.expressions.model_questions import KeyPartials
from distmerge.plan.work import WorkUnit
from distmerge.run.bundle import Bundle, Outcome, ask_bundle, merge_bundle
from distmerge.run.worker import OnBytes, Worker, WorkerSettings
from distmerge.write.shard import Receipt


class Engine(Protocol):
    """Runs units somewhere; differs from the others in nothing else.

    Raises
        WorkerLost: a unit's worker died more often than the engine retries.
        Whatever a unit raises: at once, it isn't retried.
    """

    def merge(self, units: Sequence[WorkUnit], known: Mapping[Place, Any]) -> Iterator[Receipt]:
        """A receipt for every unit, as they finish. `known` answers what methods ask about the
        whole model."""
        ...

    def ask(
        self, units: Sequence[WorkUnit], known: Mapping[Place, Any]
    ) -> Iterator[list[KeyPartials]]:
        """Each unit's share in questions about the whole model, in the order of the units."""
        ...

    def merge_together(self, bundles: Iterable[Bundle]) -> Iterator[Outcome]:
        """What came of units of several plans, each input byte read once, as they finish."""
        ...

    def ask_together(self, bundles: Iterable[Bundle]) -> Iterator[Outcome]:
        """As `ask`, for several plans."""
        ...

    def close(self) -> None: ...


class LocalEngine:
    """In this process: one worker, whose threads share each unit."""

    def __init__(self, settings: WorkerSettings, on_bytes: OnBytes | None = None) -> None:
        self._worker = Worker(settings, on_bytes)

    def merge(self, units: Sequence[WorkUnit], known: Mapping[Place, Any]) -> Iterator[Receipt]:
        """One unit after the other."""
        for unit in units:
            yield self._worker.merge(unit, known)

    def ask(
        self, units: Sequence[WorkUnit], known: Mapping[Place, Any]
    ) -> Iterator[list[KeyPartials]]:
        """One unit after the other."""
        for unit in units:
            yield self._worker.ask(unit, known)

    def merge_together(self, bundles: Iterable[Bundle]) -> Iterator[Outcome]:
        """One bundle after the other."""
        for bundle in bundles:
            yield merge_bundle(self._worker, bundle)

    def ask_together(self, bundles: Iterable[Bundle]) -> Iterator[Outcome]:
        """One bundle after the other."""
        for bundle in bundles:
            yield ask_bundle(self._worker, bundle)

    def close(self) -> None:
        """End the worker."""
        self._worker.close()
