"""Between a sweep's space and Optuna's: a study asks for settings, and is told their scores.

Ranges are floats or integers of the study; everything else is a choice among texts, so that the
study can be read by Optuna's own tools.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distmerge.errors import RecipeError
from distmerge.sweeps.sampling import DIGITS, Range, at, sobol_shares
from distmerge.sweeps.space import Settings, Space, fits

if TYPE_CHECKING:
    from optuna import Study, Trial

_SAMPLERS = {
    "tpe": "TPESampler",
    "cmaes": "CmaEsSampler",
    "random": "RandomSampler",
    "qmc": "RandomSampler",  # of which nothing is asked: see `_sobol_point`
}
_PRUNERS = {
    "none": "NopPruner",
    "median": "MedianPruner",
    "halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
}
_SECTIONS = ("combinations", "zip", "list")
"""Parts of a space of which a choice sets several paths."""
CANDIDATE = "candidate"
"""Attribute of a trial: the name of its result."""


class Trials:
    """A study over a space: it proposes settings, is told scores, and lasts in its storage."""

    def __init__(
        self,
        space: Space,
        *,
        name: str,
        storage: str,
        sampler: str,
        pruner: str,
        seed: int,
        lowest: bool,
    ) -> None:
        self._space = space
        self._sobol_seed = seed if sampler == "qmc" else None
        self._asked: dict[int, Trial] = {}
        optuna = _optuna()
        sampling = getattr(optuna.samplers, _known(sampler, _SAMPLERS, "sampler"))
        pruning = getattr(optuna.pruners, _known(pruner, _PRUNERS, "pruner"))
        try:
            self._study: Study = optuna.create_study(
                storage=storage,
                study_name=name,
                load_if_exists=True,
                direction="minimize" if lowest else "maximize",
                pruner=pruning(),
            )
        except (optuna.exceptions.OptunaError, ImportError, ValueError) as error:
            raise _no_storage(error) from None
        except Exception as error:  # SQLAlchemy's, which is no dependency of ours
            if type(error).__module__.startswith("sqlalchemy"):
                raise _no_storage(error) from None
            raise
        # A run that goes on must not draw what the run before drew.
        drawn = len(self._study.get_trials(deepcopy=False))
        options = {"seed": (seed + drawn) % (1 << 32)}  # numpy takes no larger ones
        quiet = {"warn_independent_sampling": False} if sampler == "cmaes" else {}
        self._study.sampler = sampling(**options, **quiet)
        self._again()

    def _again(self) -> None:
        """What was being evaluated when an earlier run was stopped comes first."""
        from optuna.trial import TrialState

        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            self._study.enqueue_trial(trial.params)

    @property
    def done(self) -> int:
        """Trials that have a score, or can't have one."""
        from optuna.trial import TrialState

        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        failed = [
            t for t in self._study.get_trials(states=(TrialState.FAIL,)) if "error" in t.user_attrs
        ]
        return len(self._study.get_trials(states=ended)) + len(failed)

    @property
    def candidates(self) -> list[str]:
        """The names of the results that trials led to, each once, in their order."""
        names = [trial.user_attrs.get(CANDIDATE) for trial in self._study.get_trials()]
        return list(dict.fromkeys(name for name in names if name is not None))

    def ask(self) -> tuple[int, Settings] | None:
        """A trial's number and its settings; None if a rule excludes them, which ends it."""
        from optuna.trial import TrialState

        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if self._sobol_seed is not None and not waiting:
            number = len(self._study.get_trials(deepcopy=False))
            self._study.enqueue_trial(_sobol_point(self._space, number, self._sobol_seed))
        trial = self._study.ask()
        settings = suggest(trial, self._space)
        if any(fits(rule, settings) for rule in self._space.exclude):
            self._study.tell(trial, state=TrialState.PRUNED)
            return None
        self._asked[trial.number] = trial
        return trial.number, settings

    def should_stop(self, number: int, step: int, value: float) -> bool:
        """Note a score on the way; is the trial worse than others were there?"""
        trial = self._asked[number]
        trial.report(value, step)
        return trial.should_prune()

    def tell(self, number: int, candidate: str, score: float) -> None:
        """What a trial led to."""
        self._asked[number].set_user_attr(CANDIDATE, candidate)
        self._study.tell(self._asked.pop(number), score)

    def tell_stopped(self, number: int) -> None:
        """It was stopped on the way, being worse than others."""
        from optuna.trial import TrialState

        self._study.tell(self._asked.pop(number), state=TrialState.PRUNED)

    def tell_failed(self, number: int, candidate: str, reason: str) -> None:
        """There is no score."""
        from optuna.trial import TrialState

        trial = self._asked.pop(number)
        trial.set_user_attr(CANDIDATE, candidate)
        trial.set_user_attr("error", reason)
        self._study.tell(trial, state=TrialState.FAIL)


def axes_of(space: Space) -> dict[str, Range | list[Any]]:
    """What a trial's parameters are drawn from: ranges, or choices among values or settings."""
    found: dict[str, Range | list[Any]] = {}
    if space.combinations:
        found["combinations"] = list(space.combinations.choices())
    found |= space.grid
    if space.zipped:
        found["zip"] = space.zipped_rows()
    if space.listed:
        found["list"] = list(space.listed)
    return found | (space.sample.over if space.sample else {})


def suggest(trial: Trial, space: Space) -> Settings:
    """The settings of a trial, as a candidate of a sweep has them."""
    found: Settings = {}
    for name, axis in axes_of(space).items():
        if not isinstance(axis, Range):
            texts = {_text(value): value for value in axis}
            value = texts[trial.suggest_categorical(name, list(texts))]
            found |= value if name in _SECTIONS else {name: value}
        elif axis.integer:
            first, last = math.ceil(axis.min), math.floor(axis.max)
            found[name] = trial.suggest_int(name, first, last, log=axis.log)
        else:
            drawn = trial.suggest_float(name, axis.min, axis.max, log=axis.log)
            found[name] = min(max(float(f"{drawn:.{DIGITS}g}"), axis.min), axis.max)
    return found


def _sobol_point(space: Space, number: int, seed: int) -> dict[str, Any]:
    """The parameters of a trial at a point of a scrambled Sobol sequence. Optuna's own sampler of
    that kind needs SciPy, which nothing else here does."""
    axes = axes_of(space)
    (shares,) = sobol_shares(len(axes), 1, seed, first=number)
    found = {name: at(axis, s) for (name, axis), s in zip(axes.items(), shares, strict=True)}
    return {n: v if isinstance(axes[n], Range) else _text(v) for n, v in found.items()}


def _text(value: Any) -> str:
    return json.dumps(value, default=str)


def _known(name: str, known: Mapping[str, str], kind: str) -> str:
    if name not in known:
        raise RecipeError(f"There is no {kind} {name!r}.", fix=f"--{kind} {', '.join(known)}")
    return known[name]


def _no_storage(error: Exception) -> RecipeError:
    return RecipeError(
        "The study can't be kept at its storage.",
        (str(error).strip().splitlines() or ["no reason given"])[0],
        fix="--storage sqlite:///study.db",
    )


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise RecipeError(
            "A search needs Optuna, which isn't installed.", fix="pip install 'distmerge[search]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
