"""Every error that distmerge raises on purpose.

    DistmergeError
    |-- CheckpointError (ValueError)            a model can't be used as it is
    |   |-- CheckpointNotFound (FileNotFoundError)
    |   |-- AccessDenied (PermissionError)
    |   |-- MalformedCheckpoint                 headers that contradict themselves or the file
    |   `-- SourceChanged                       the model changed after it was pinned
    |-- ReadFailed (OSError)                    retries are used up
    |-- RecipeError (ValueError)                what was asked for makes no sense
    |   |-- UnknownMethod
    |   `-- ParameterError
    |-- MismatchError (ValueError)              the models don't fit together
    |   |-- KeyMismatch (KeyError)
    |   |-- ShapeMismatch
    |   `-- DtypeMismatch (TypeError)
    |-- MemoryBudgetError (MemoryError)         the plan needs more than --allowed-mem
    |-- OutputError (OSError)
    |   |-- OutputExists (FileExistsError)
    |   `-- OutputLocked                        another run holds the output
    |-- MethodError (RuntimeError)              a merge method raised or broke its contract
    |-- NonFiniteResult (ArithmeticError)
    |-- VerificationFailed (RuntimeError)
    |-- SweepFailed (RuntimeError)             some candidates of a sweep could not be merged
    `-- WorkerLost (RuntimeError)

Each reads: one headline sentence, one fact per line, and a `Fix:` line with something to type.
The command line prints it without a traceback and exits with 2.
"""

from __future__ import annotations

from distmerge.credentials import redact

LONGEST = 1000
"""Characters of a headline, a fact or a fix that are shown."""


class DistmergeError(Exception):
    """A headline, the facts behind it and what to do about it.

    `str(error)` is the headline, then each fact on an indented line, then `Fix: ...`. Of what is
    quoted, secrets are replaced by stars, control characters by their numbers.
    """

    def __init__(self, headline: str, *facts: str, fix: str | None = None) -> None:
        self.headline = shown(headline)
        self.facts = tuple(map(shown, facts))
        self.fix = fix and shown(fix)
        super().__init__(self.headline, *self.facts)

    def __str__(self) -> str:
        lines = [self.headline, *(f"  {fact}" for fact in self.facts)]
        if self.fix:
            lines.append(f"Fix: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.headline, self.facts, self.fix)


def printable(text: str, *, but: str = "") -> str:
    """Without control characters: names come from files, and a terminal obeys them.

    but: those that stay.
    """
    return "".join(c if c.isprintable() or c in but else f"\\x{ord(c):02x}" for c in text)


def shown(text: str) -> str:
    """What may be seen of a text that names from files and recipes are a part of: on one line, of
    bounded length, without secrets and without what terminals obey."""
    text = printable(redact(text[: 10 * LONGEST]))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"


def _rebuild(
    kind: type[DistmergeError], headline: str, facts: tuple[str, ...], fix: str | None
) -> DistmergeError:
    return kind(headline, *facts, fix=fix)


class CheckpointError(DistmergeError, ValueError):
    """A model can't be used as it is."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """Nothing is at that path, URL or Hub id."""


class AccessDenied(CheckpointError, PermissionError):
    """The model is there, but these credentials don't open it."""


class MalformedCheckpoint(CheckpointError):
    """A header contradicts itself or the file it heads."""


class SourceChanged(CheckpointError):
    """A pinned input is no longer the bytes that were pinned."""


class ReadFailed(DistmergeError, OSError):
    """A byte range could not be read, retries included."""


class RecipeError(DistmergeError, ValueError):
    """The recipe asks for something that makes no sense."""


class UnknownMethod(RecipeError):
    """No merge method of that name."""


class ParameterError(RecipeError):
    """A parameter that the method doesn't have, or a value it can't take."""


class MismatchError(DistmergeError, ValueError):
    """The models don't fit together."""


class KeyMismatch(MismatchError, KeyError):
    """Models disagree on which tensors there are."""


class ShapeMismatch(MismatchError):
    """Models disagree on a tensor's shape."""


class DtypeMismatch(MismatchError, TypeError):
    """Dtypes that can't be merged with one another."""


class MemoryBudgetError(DistmergeError, MemoryError):
    """The plan needs more memory than it was allowed."""


class OutputError(DistmergeError, OSError):
    """The output can't be written."""


class OutputExists(OutputError, FileExistsError):
    """Something is published there already."""


class OutputLocked(OutputError):
    """Another run is writing this output."""


class MethodError(DistmergeError, RuntimeError):
    """A merge method raised, or broke what it promised."""


class NonFiniteResult(DistmergeError, ArithmeticError):
    """A merged tensor holds NaN or infinity."""


class VerificationFailed(DistmergeError, RuntimeError):
    """An output is not what its manifest says."""


class SweepFailed(DistmergeError, RuntimeError):
    """Some candidates of a sweep could not be merged; the others are written."""


class WorkerLost(DistmergeError, RuntimeError):
    """A worker died more often than the engine retries."""
