"""State dicts that hold their tensors and compute at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from distmerge.errors import KeyMismatch, RecipeError, ShapeMismatch
from distmerge.expressions.arithmetic import (
    Arithmetic,
    as_number,
    as_tensor,
    as_tensors,
    at_most,
    calculate,
    calculate_pair,
    check_tensor,
    counted,
    dict_of_tensors,
    is_pipeline,
    shape_text,
)
from distmerge.expressions.nodes import OnMissing, Operator, TensorLeaf

if TYPE_CHECKING:
    from distmerge.expressions.lazy import LazyStateDict


class StateDict(Arithmetic, dict[str, Tensor]):
    """A dict of tensors that adds, subtracts, scales and divides, key by key.

        legal = StateDict.from_hf("org/gpt2-legal")
        merged = base + 0.5 * (legal - base)
        pipe = merged.to_model("gpt2")

    Results are new: no operation writes into a tensor that it was given, the in-place forms
    included, which put new tensors under the dict's keys. Keys keep the left operand's order.
    Integer and boolean tensors (positions, masks, counters) are nothing to calculate with: beside
    numbers they stay as they are, beside one another they must be equal. 8-bit floats are widened
    to float32; otherwise dtypes promote as torch's do.

    Raises, from its operators
        KeyMismatch: a key that one side lacks (`add(..., on_missing="common")` leaves it out).
        ShapeMismatch: shapes that differ, or a tensor that doesn't broadcast to an entry's shape.
        DtypeMismatch: integer tensors that aren't equal, or values that aren't tensors.
    """

    def __init__(self, *args: Any, **tensors: Tensor) -> None:
        with dict_of_tensors(args):
            super().__init__(*args, **tensors)

    @classmethod
    def from_model(cls, model: nn.Module | Mapping[str, Tensor] | Any) -> Self:
        """The parameters of a module or of a pipeline's model, by name and in module order.

        Tied parameters come once. They are detached but not copied: what is trained on in the
        module changes here, while no operation of a StateDict ever changes the module.

        Raises
            RecipeError: neither module, pipeline nor dict.
        """
        tensors = as_tensors(model)
        if tensors is None:
            name = f"{model!r} is the name of a model" if isinstance(model, str) else repr(model)
            raise RecipeError(
                f"StateDict.from_model takes a module or a pipeline: {name}.",
                fix=f"StateDict.from_hf({model!r})" if isinstance(model, str) else "pipe.model",
            )
        return cls(tensors)

    @classmethod
    def from_hf(cls, name: str, task: str | None = None, **options: Any) -> Self:
        """The parameters of a Hub id's or local directory's model, loaded by transformers.

        task: of transformers' pipelines; inferred from the config if left out.
        options: for `transformers.pipeline`; those that it no longer takes are dropped.

        Raises
            CheckpointNotFound, AccessDenied, CheckpointError, ParameterError
        """
        from distmerge.huggingface import load_pipeline  # a door upward

        return cls.from_model(load_pipeline(name, task, **options))

    @classmethod
    def zeros_like(cls, item: Any, **options: Any) -> Self:
        """Zeros in the shapes of a dict's, module's or pipeline's tensors, or of those that a
        name's model has (`options` as in `from_hf`): the start of a sum. Integer and boolean
        tensors are copied."""
        tensors = cls.from_hf(item, **options) if isinstance(item, str) else cls.from_model(item)
        return cls(
            (k, torch.zeros_like(v) if v.is_floating_point() else v.clone())
            for k, v in tensors.items()
        )

    def to_model(
        self,
        model: Any,
        task: str | None = None,
        *,
        device: str | int | torch.device | None = None,
        verbose: bool = False,
        **options: Any,
    ) -> Any:
        """These weights in a model like `model`, which stays as it is.

        A name gives a pipeline of that model, a pipeline another pipeline, a module another
        module, a dict this StateDict. `task` and `options` matter to names, as in `from_hf`;
        `verbose` has nothing left to report, since what doesn't fit is an error.

        Raises
            KeyMismatch: tensors missing or left over.
            ShapeMismatch, DtypeMismatch: tensors that don't fit the model's.
            RecipeError: `model` is none of these.
            CheckpointNotFound, AccessDenied, CheckpointError, ParameterError: as `from_hf`.
        """
        from distmerge.huggingface import like_pipeline, to_module, to_pipeline  # doors upward

        if isinstance(model, str):
            return to_pipeline(self, model, task, device=device, **options)
        if isinstance(model, nn.Module):
            return to_module(self, model, device=device)
        if is_pipeline(model):
            made = like_pipeline(model, to_module(self, model.model, device=device))
            if device is not None:
                made.device = next(made.model.parameters()).device
            return made
        if isinstance(model, Mapping):
            return self if device is None else self.to(device)
        raise RecipeError(
            f"A {type(model).__name__} is no model to put weights into.",
            fix="to_model() of a name, a module, a pipeline or a dict",
        )

    def save(
        self,
        out: str | os.PathLike[str],
        *,
        like: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> LazyStateDict:
        """Write a checkpoint as merges do: shards, index and manifest. It comes back, opened.

        like: the name of a model that gives config, tokenizer and the other files; without one
            the checkpoint has weights alone, which transformers can't load.
        options: those of `distmerge.merge`: max_shard_size, out_dtype, overwrite, ...

        Raises
            what `distmerge.merge` does
        """
        from distmerge.expressions.lazy import LazyStateDict, open_lazy  # built of what is here

        given = options.get("storage_options")
        donor = None if like is None else open_lazy(like, storage_options=given).request().donor
        held = TensorLeaf(dict(self), "state_dict")
        return LazyStateDict(held, donor=donor).save(out, **options)

    # --- parts and copies

    def subset(self, keys: Iterable[str]) -> Self:
        """A new StateDict of these keys, in the order given. Raises KeyMismatch."""
        wanted = list(keys)
        self._check_known(wanted)
        return type(self)((key, self[key]) for key in wanted)

    def remove(self, keys: Iterable[str]) -> Self:
        """Take these keys out of this StateDict, and return it. Raises KeyMismatch."""
        unwanted = list(dict.fromkeys(keys))
        self._check_known(unwanted)
        for key in unwanted:
            del self[key]
        return self

    def filter_values(self, condition: Callable[[Tensor], bool]) -> Self:
        """Take out of this StateDict the tensors for which `condition` is false, and return it."""
        return self.remove([key for key, value in self.items() if not condition(value)])

    def to(
        self,
        device: str | int | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A new StateDict on a device, in a dtype, or both (`to("cuda")`, `to(torch.float16)`).
        Only floating-point tensors change their dtype; what needs no change is shared."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        return type(self)(
            (k, v.to(device=device, dtype=dtype if v.is_floating_point() else None))
            for k, v in self.items()
        )

    def copy(self) -> Self:
        """A StateDict with copies of the tensors."""
        return type(self)((key, value.detach().clone()) for key, value in self.items())

    def __or__(self, other: Any) -> Self:  # type: ignore[override]
        joined = super().__or__(other)
        return joined if joined is NotImplemented else type(self)(joined)

    def __ror__(self, other: Any) -> Self:  # type: ignore[override]
        joined = super().__ror__(other)
        return joined if joined is NotImplemented else type(self)(joined)

    def __repr__(self) -> str:
        numel = sum(v.numel() for v in self.values() if isinstance(v, Tensor))
        return f"<StateDict: {len(self)} tensors, {numel:,} elements>"

    def _check_known(self, keys: Iterable[str]) -> None:
        unknown = [key for key in keys if key not in self]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), list(self), 1)
            raise KeyMismatch(
                f"{counted(unknown, 'key')} not in this state dict.",
                *at_most([str(key) for key in unknown]),
                fix=f"did you mean {near[0]!r}?" if near else "list(state_dict) shows its keys",
            )

    # --- arithmetic

    def _binary(
        self,
        operator: Operator,
        other: Any,
        *,
        swapped: bool = False,
        on_missing: OnMissing = "error",
    ) -> Self:
        if isinstance(other, Arithmetic) and not isinstance(other, StateDict):
            # A lazy one: it knows how to take us in.
            return NotImplemented  # type: ignore[no-any-return]
        number = as_number(other)
        operand = as_tensor(other) if number is None else number
        if operand is not None:
            return type(self)(
                (key, calculate(operator, key, value, operand, swapped=swapped))
                for key, value in self.items()
            )
        tensors = as_tensors(other)
        if tensors is None:
            return NotImplemented  # type: ignore[no-any-return]
        left, right = (tensors, self) if swapped else (self, tensors)
        if on_missing == "error":
            _check_keys(left, right)
        common = [key for key in left if key in right]
        _check_shapes(common, left, right)
        return type(self)((k, calculate_pair(operator, k, left[k], right[k])) for k in common)

    def _unchanged(self) -> Self:
        return type(self)(self)

    def __iadd__(self, other: Any) -> Self:
        return self._rebind(self._binary("+", other))

    def __isub__(self, other: Any) -> Self:
        return self._rebind(self._binary("-", other))

    def __imul__(self, other: Any) -> Self:
        return self._rebind(self._binary("*", other))

    def __itruediv__(self, other: Any) -> Self:
        return self._rebind(self._binary("/", other))

    def _rebind(self, result: Self) -> Self:
        if result is not NotImplemented:
            self.update(result)
            return self
        return result


def _check_keys(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    facts = [f"{key}: only on the left" for key in left if key not in right]
    facts += [f"{key}: only on the right" for key in right if key not in left]
    if facts:
        raise KeyMismatch(
            f"The two state dicts disagree on {counted(facts, 'key')}.",
            *at_most(facts),
            fix="a.add(b, on_missing='common') takes the keys that both have",
        )


def _check_shapes(
    keys: Iterable[str], left: Mapping[str, Tensor], right: Mapping[str, Tensor]
) -> None:
    facts = []
    for key in keys:
        check_tensor(key, left[key])
        check_tensor(key, right[key])
        if left[key].shape != right[key].shape:
            facts.append(f"{key}: {shape_text(left[key])} and {shape_text(right[key])}")
    if facts:
        raise ShapeMismatch(
            f"The two state dicts disagree on the shape of {counted(facts, 'tensor')}.",
            *at_most(facts),
            fix="subset() of the keys that fit, or models of one architecture",
        )
