"""State dicts that are expressions: checkpoints opened by header, computed when asked for."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

from torch import Tensor

from distmerge.checkpoints.opening import open_checkpoint
from distmerge.checkpoints.renaming import Rename, read_rules
from distmerge.checkpoints.storage_options import check_storage_options
from distmerge.errors import KeyMismatch, RecipeError
from distmerge.expressions.alignment import Inputs, align
from distmerge.expressions.argument_kinds import checked
from distmerge.expressions.arithmetic import (
    Arithmetic,
    as_number,
    as_tensor,
    as_tensors,
    at_most,
    check_number,
    counted,
    module_of,
    shape_text,
)
from distmerge.expressions.compiler import Compiler
from distmerge.expressions.eager import evaluate_eagerly
from distmerge.expressions.nodes import (
    Binary,
    Expression,
    Leaf,
    OnMissing,
    Operator,
    Select,
    TensorLeaf,
    check_size,
    leaves,
)
from distmerge.expressions.request import MergeRequest, request_for
from distmerge.expressions.settings import Settings, join_settings
from distmerge.expressions.state_dict import StateDict


def open_lazy(
    url: str | os.PathLike[str],
    *,
    revision: str | None = None,
    rename: Rename | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> LazyStateDict:
    """Open a checkpoint by its headers: a directory, a weight file, an fsspec URL or a Hub id;
    or one of these with a LoRA adapter, `base+adapter`.

        base, legal = distmerge.open("gpt2"), distmerge.open("s3://bucket/legal")
        (base + 0.5 * (legal - base)).save("merged")

    revision: of a Hub repository.
    rename: what its keys are called instead, {"old.prefix.": "new.prefix."} or rules like
        [{"regex": r"^h[.](\\d+)", "to": r"layers.\\1"}], each applied to what the ones before made.
    storage_options: fsspec's keyword arguments for the URL's filesystem.

    Raises
        CheckpointNotFound, AccessDenied, MalformedCheckpoint, CheckpointError, ReadFailed
        ParameterError, KeyMismatch: rules that are none, or that give two tensors one name.
    """
    rules = read_rules(rename)
    check_storage_options({} if storage_options is None else storage_options)
    checkpoint = open_checkpoint(
        url, revision=revision, rename=rules, storage_options=storage_options
    )
    return LazyStateDict(Leaf.of(checkpoint), storage_options=storage_options)


class LazyStateDict(Arithmetic, Mapping[str, Tensor]):
    """An expression over checkpoints that reads like a dict of tensors.

    Arithmetic builds a larger expression; nothing is read but headers. `lazy["key"]` computes one
    tensor, `collect()` all of them, `save(url)` streams them to a new checkpoint. Dicts, modules
    and pipelines may be operands, numbers too; tensors other than zero-dimensional ones may not.
    Results have the dtypes of the first checkpoint, the arithmetic is float32 throughout (float64
    where an operand is).
    """

    def __init__(
        self,
        expression: Expression,
        *,
        donor: Leaf | None = None,
        seed: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """donor, seed, storage_options: see `distmerge.expressions.settings.Settings`."""
        if not isinstance(expression, Expression):
            raise RecipeError(
                f"A LazyStateDict is made of an expression, not of a {type(expression).__name__}.",
                fix="distmerge.open('org/name')",
            )
        check_size(expression.size, "The expression")
        self.expression = expression
        self.settings = Settings(donor, seed, dict(storage_options or {}))

    def request(self) -> MergeRequest:
        """What `distmerge.merge` plans."""
        settings = self.settings
        request = request_for(
            self.expression, seed=settings.seed or 0, storage_options=settings.storage_options
        )
        return replace(request, donor=settings.donor) if settings.donor else request

    # --- a mapping

    @cached_property
    def _inputs(self) -> Inputs:
        return align(self.expression, self.request().donor)

    @cached_property
    def _keys(self) -> dict[str, None]:
        """The output's keys, found by planning every key: what is wrong shows here."""
        compiler = Compiler(self.expression, self._inputs)
        programs = [compiler.program(key) for key in self._inputs.keys]
        compiler.problems.raise_any()
        return {program.key: None for program in programs if program is not None}

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __getitem__(self, key: str) -> Tensor:
        """Compute one tensor. Raises KeyMismatch, and errors as `collect`."""
        return self.collect([key])[key]

    def __eq__(self, other: object) -> bool:
        """Is it the same expression? Nothing is computed."""
        return isinstance(other, LazyStateDict) and self.expression == other.expression

    def __hash__(self) -> int:
        return hash(self.expression)

    def __repr__(self) -> str:
        return f"<LazyStateDict: {self.expression}>"

    # --- what it does

    def collect(self, keys: Iterable[str] | None = None) -> StateDict:
        """Stream the tensors, all or those of `keys`, into memory.

        Raises
            KeyMismatch, ShapeMismatch, DtypeMismatch: from headers, before anything is read.
            ParameterError, MethodError, MemoryBudgetError, ReadFailed, SourceChanged
        """
        wanted = None if keys is None else list(dict.fromkeys(_listed(keys)))
        if wanted is not None:
            self._check_known(wanted)
        if any(isinstance(leaf, Leaf) for leaf in leaves(self.expression)):
            from distmerge.run.collect import collect  # a door upward

            found = collect(self.request(), wanted)
        else:
            part = self.expression if wanted is None else Select(self.expression, frozenset(wanted))
            found = evaluate_eagerly(part, seed=self.settings.seed or 0)
        return StateDict(found if wanted is None else {key: found[key] for key in wanted})

    def save(self, out: str | os.PathLike[str], engine: str = "local", **options: Any) -> Self:
        """Stream the result to a checkpoint at `out`, and open that lazily.

        options: those of `distmerge.merge`: workers, allowed_mem, max_shard_size, out_dtype,
            device, overwrite, storage_options (for `out` too), ...

        Raises
            what `distmerge.merge` does
        """
        from distmerge.run.merge import merge  # a door upward

        given = options.pop("storage_options", None) or {}
        place = checked("save", {"out": out, "storage_options": given})["out"]
        options_then = self.settings.options_with(self.expression, place, given)
        request = replace(self.request(), storage_options=options_then)
        return merge(request, place, engine=engine, **options)  # type: ignore[return-value]

    def explain(self) -> str:
        """The formula, what each model in it is, and how their names were matched."""
        lines = [str(self.expression)]
        for leaf, tensors in zip(self._inputs.leaves, self._inputs.tensors, strict=True):
            lines.append(f"  {leaf}: {counted(list(tensors), 'tensor')}, {_place(leaf)}")
        lines += [f"  {sentence}" for sentence in self._inputs.mappings]
        reasons = Counter((skipped.model, skipped.reason) for skipped in self._inputs.skipped)
        for (model, reason), count in reasons.items():
            lines.append(f"  {model}: {count} not used: {reason}")
        return "\n".join(lines)

    def subset(self, keys: Iterable[str]) -> Self:
        """The same, of these keys only, in the expression's order. Raises KeyMismatch."""
        wanted = _listed(keys)
        self._check_known(wanted)
        return self._with(Select(self.expression, frozenset(wanted)))

    def copy(self) -> Self:
        """Another object for the same expression."""
        return self._with(self.expression)

    def _check_known(self, keys: Iterable[str]) -> None:
        unknown = [key for key in keys if key not in self._keys]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), list(self._keys), 1)
            raise KeyMismatch(
                f"{counted(unknown, 'key')} not in {self.expression}.",
                *at_most([str(key) for key in unknown]),
                fix=f"did you mean {near[0]!r}?" if near else "list(lazy) shows its keys",
            )

    # --- arithmetic

    def _with(self, expression: Expression) -> Self:
        return self._made(expression, self.settings)

    def _made(self, expression: Expression, settings: Settings) -> Self:
        return type(self)(
            expression,
            donor=settings.donor,
            seed=settings.seed,
            storage_options=settings.storage_options,
        )

    def _unchanged(self) -> Self:
        return self.copy()

    def _binary(
        self,
        operator: Operator,
        other: Any,
        *,
        swapped: bool = False,
        on_missing: OnMissing = "error",
    ) -> Self:
        number = as_number(other)
        if number is not None:
            check_number(operator, number, divides=not swapped)
            sides = (number, self.expression) if swapped else (self.expression, number)
            return self._with(Binary(operator, *sides))
        if (tensor := as_tensor(other)) is not None:
            raise RecipeError(
                f"A tensor of shape {shape_text(tensor)} can't be an operand of a lazy state dict.",
                "numbers and zero-dimensional tensors can",
                fix="lazy.collect() first, or a dict with a tensor for each key",
            )
        lazy = as_lazy(other)
        if lazy is None:
            return NotImplemented  # type: ignore[no-any-return]
        left, right = (lazy, self) if swapped else (self, lazy)
        return self._made(
            Binary(operator, left.expression, right.expression, on_missing),
            join_settings([(lazy.expression, lazy.settings) for lazy in (left, right)]),
        )


def as_lazy(operand: Any) -> LazyStateDict | None:
    """A dict, module or pipeline as an expression, a lazy one as it is; None for anything else.

    What the mapping holds now counts: keys put into it afterwards don't.
    """
    if isinstance(operand, LazyStateDict):
        return operand
    tensors = as_tensors(operand)
    if tensors is None:
        return None
    module = module_of(operand)
    name = "state_dict" if module is None else type(module).__name__
    return LazyStateDict(TensorLeaf(dict(tensors), name))


def _listed(keys: Iterable[str]) -> list[str]:
    if not isinstance(keys, Iterable):
        raise RecipeError(f"{keys!r:.60} is no list of keys.", fix="list(lazy) shows its keys")
    return list(keys)


def _place(leaf: Leaf | TensorLeaf) -> str:
    if isinstance(leaf, TensorLeaf):
        return f"{_megabytes(sum(t.nbytes for t in leaf.tensors.values()))}, in memory"
    found = leaf.checkpoint
    pinned = f" at {found.revision[:12]}" if found.revision else ""
    return f"{_megabytes(found.nbytes)}, {found.url}{pinned}"


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 100_000 else f"{nbytes:,} bytes"
