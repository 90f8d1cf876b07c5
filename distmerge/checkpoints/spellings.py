"""Between the names in one model's files and the plain names under which models are compared.

Plain names have no wrappers and today's spellings. What the model's code rebuilds by itself is
told apart from parameters, and tied copies from tensors of their own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from distmerge.errors import KeyMismatch


class Described(Protocol):
    """What is known of a tensor without reading it: `TensorInfo`, or a tensor itself."""

    @property
    def shape(self) -> Sequence[int]:
        """Elements along each dimension."""
        ...

    @property
    def dtype(self) -> Any:
        """safetensors' name, or torch's dtype."""
        ...


Tensors = Mapping[str, Described]

_INTEGER = re.compile(r"(torch\.)?u?int\d+|[IU]\d+")
_BYTES = frozenset({"U8", "BOOL", "torch.uint8", "torch.bool"})


def buffers(tensors: Tensors) -> dict[str, str]:
    """Keys that hold no parameter but what the model's code rebuilds -> the reason.

    Judged by name and shape together: an `attn.bias` of shape [n] is a parameter and stays, as
    do buffers with a state of their own, such as running means.
    """
    found = {}
    for key, info in tensors.items():
        what = _rebuilt(key, info)
        if what:
            found[key] = f"{what}, rebuilt by the model's code"
    return found


def _rebuilt(key: str, info: Described) -> str | None:
    parent, _, last = key.rpartition(".")
    rank = len(info.shape)
    match last:
        case "bias" | "causal_mask" if parent.endswith(("attn", "attention")):
            return "mask buffer" if _is_mask(info) else None
        case "masked_bias":
            return "mask value" if all(n == 1 for n in info.shape) else None
        case "position_ids" | "token_type_ids":
            integer = _INTEGER.fullmatch(str(info.dtype))
            return "index buffer" if integer and rank <= 2 else None
        case "inv_freq" if parent.endswith("rotary_emb"):
            return "rotary frequencies" if rank == 1 else None
        case "cos_cached" | "sin_cached" if parent.endswith("rotary_emb"):
            return "rotary table" if rank >= 2 else None
    return None


def _is_mask(info: Described) -> bool:
    shape = tuple(info.shape)
    square = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3] > 1
    return square or (len(shape) >= 2 and str(info.dtype) in _BYTES)


_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_TODAY = {
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}
_OLD = tuple(_TODAY)


@dataclass
class Side:
    """One model under plain names, without what its code rebuilds."""

    tensors: Tensors
    targets: Mapping[str, str]
    """Alias -> the key in `tensors` whose storage it shares."""
    buffers: Mapping[str, str]
    data_parallel: bool
    """Every key starts with `module.`, which DataParallel puts there."""
    plain: dict[str, str] = field(default_factory=dict)
    """Plain name -> key in `tensors`."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Plain name of an alias -> the alias as the file spells it."""

    def names(self) -> Iterator[str]:
        """Every plain name, those of aliases last."""
        yield from self.plain
        yield from self.aliases

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor or alias with that plain name."""
        key = self.plain.get(name) or self.targets[self.aliases[name]]
        return tuple(self.tensors[key].shape)

    def plain_name(self, key: str) -> str:
        """The key without wrappers and in today's spelling."""
        if self.data_parallel:
            key = key.removeprefix("module.")
        if "_wrapped_module." in key or "_orig_mod." in key:
            for wrapper in _WRAPPERS:
                key = key.replace(wrapper, "")
        if key.endswith(_OLD):
            old = next(ending for ending in _OLD if key.endswith(ending))
            key = key.removesuffix(old) + _TODAY[old]
        return key

    def rewritings(self, key: str) -> set[tuple[str, str]]:
        """What `plain_name` does to a key, as (from, to)."""
        done = {("module.X", "X")} if self.data_parallel else set()
        done |= {(f"{wrapper}X", "X") for wrapper in _WRAPPERS if wrapper in key}
        return done | {(old, new) for old, new in _TODAY.items() if key.endswith(old)}

    def respell(self, name: str) -> str:
        """A plain name as this model would spell a tensor that it doesn't have."""
        for old in self._habits:
            if name.endswith(_TODAY[old]):
                name = name.removesuffix(_TODAY[old]) + old
        return f"module.{name}" if self.data_parallel else name

    @cached_property
    def _habits(self) -> set[str]:
        dated = [key for key in self.plain.values() if key.endswith(_OLD)]
        return {old for old in _OLD if any(key.endswith(old) for key in dated)}


def open_side(tensors: Tensors, aliases: Mapping[str, str]) -> Side:
    """Bring one model's names into plain form.

    Raises
        KeyMismatch: two tensors have the same plain name.
    """
    parallel = bool(tensors) and all(key.startswith("module.") for key in (*tensors, *aliases))
    side = Side(tensors, aliases, buffers(tensors), parallel)
    for key in tensors:
        if key not in side.buffers:
            name = side.plain_name(key)
            if side.plain.setdefault(name, key) != key:
                raise two_for_one(name, side.plain[name], key)
    for alias, key in aliases.items():
        name = side.plain_name(alias)
        if key in tensors and key not in side.buffers and name not in side.plain:
            side.aliases.setdefault(name, alias)
    return side


OUTPUT = re.compile(
    r"(^|\.)(\w*lm_head|(lm_head|predictions)\.decoder|vocab_projector|embed_out|proj_out|output)"
    r"\.weight$"
)
"""Output layers that are often tied to the input embedding."""
EMBEDDING = re.compile(
    r"(^|\.)(\w*embed_tokens|\w*word_embeddings?|wte|shared|\w*embed_in)\.weight$"
)
_IN_LAYER = re.compile(r"(^|\.)\d+\.")
_OUTPUT_BIAS = re.compile(r"(^|\.)(predictions|lm_head)\.decoder\.bias$")
"""Output layers' biases, of which old files have a copy beside the head's own."""


def ties(config: Mapping[str, Any] | None) -> bool:
    """Whether a config says that output and input embeddings are one tensor."""
    if config is None:
        return False
    for part in _language_parts(config):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    # Until version 5 transformers left the entry out when it was true, and only then.
    return re.match(r"[0-4]\.", str(config.get("transformers_version", ""))) is not None


def vocabulary(*configs: Mapping[str, Any] | None) -> frozenset[int]:
    """The sizes of vocabularies that configs tell of."""
    parts = [part for config in configs if config is not None for part in _language_parts(config)]
    sizes = [part.get(name) for part in parts for name in ("vocab_size", "n_words")]
    return frozenset(size for size in sizes if isinstance(size, int))


def _language_parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    text = config.get("text_config")
    if isinstance(text, Mapping):
        yield text


def may_be_tied(name: str, shape: tuple[int, ...], vocabulary: Collection[int]) -> bool:
    """Does a tensor stand for a vocabulary, by its name or by its shape?"""
    if OUTPUT.search(name) or EMBEDDING.search(name):
        return True
    return len(shape) == 2 and shape[0] in vocabulary and not _IN_LAYER.search(name)


def tied_to(
    name: str, shape: tuple[int, ...], side: Side, among: Collection[str], words: Collection[int]
) -> list[str]:
    """Those of the keys `among` of which a tied copy with this plain name and shape may be one."""
    if _OUTPUT_BIAS.search(name):
        own = side.plain.get(name.removesuffix("decoder.bias") + "bias")
        if own is None or own not in among or tuple(side.tensors[own].shape) != shape:
            return []
        return [own]
    if not may_be_tied(name, shape, words):
        return []
    alike = (n for n in side.plain if n != name and side.shape(n) == shape)
    return [side.plain[n] for n in alike if side.plain[n] in among and may_be_tied(n, shape, words)]


def two_for_one(name: str, first: str, second: str) -> KeyMismatch:
    """The error for two tensors of one model that stand for one of the other."""
    return KeyMismatch(
        f"Two tensors of one model stand for {name}.",
        first,
        second,
        fix="save the model again with save_pretrained(), which stores each tensor once",
    )
