"""A checkpoint with a LoRA adapter: the base's keys, the adapter's share added as they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from distmerge.checkpoints.adapter_config import AdapterConfig
from distmerge.checkpoints.layout import listed
from distmerge.checkpoints.low_rank import LowRank, Shifted
from distmerge.checkpoints.names import match_names
from distmerge.checkpoints.tensors import Checkpoint, TensorInfo
from distmerge.checkpoints.views import Part, Plain, View, as_view
from distmerge.errors import CheckpointError, MalformedCheckpoint

_PREFIX = "base_model.model."
_ROLES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
}
"""How the adapter's tensors are called below their module."""
_UNKNOWN = (".lora_", ".trainable_tokens", ".vera_", ".hada_", ".lokr_", ".oft_", ".ia3_")
_WRAPPERS = ("base_layer.", "modules_to_save.default.", "modules_to_save.", "original_module.")


@dataclass
class _Module:
    """The adapter's tensors for one module."""

    name: str
    parts: dict[str, Part] = field(default_factory=dict)
    embedding: bool = False


@dataclass
class _Sorted:
    """An adapter's tensors by what they are for."""

    modules: dict[str, _Module] = field(default_factory=dict)
    replaced: dict[str, Part] = field(default_factory=dict)
    """Tensors that stand instead of the base's: the model's own name -> the part."""


def with_adapter(base: Checkpoint, adapter: Checkpoint, config: AdapterConfig) -> Checkpoint:
    """The base as the adapter changes it; nothing is read.

    Raises
        CheckpointError: the adapter's tensors don't fit the base, or aren't known.
        MalformedCheckpoint: they contradict one another.
    """
    found = _sort(adapter)
    config.check_modules(len(found.modules), adapter.url)
    presented = base.presented
    keys = _own_names(base, presented, found, adapter.url)
    views: dict[str, View] = {}
    swapped = _stored_swapped(presented, found, keys, config)
    for name, part in found.replaced.items():
        key = keys[name]
        dtype = presented[key].dtype if key in presented else part.info.dtype
        views[key] = Plain(dtype, part.info.shape, part)
    for module in found.modules.values():
        key = keys[f"{module.name}.weight"]
        inner = views[key] if key in views else as_view(presented[key])
        views[key] = _changed(inner, module, config, adapter.url, swapped=swapped)
        if "bias" in module.parts:
            bias = keys[f"{module.name}.bias"]
            below = views[bias] if bias in views else as_view(presented[bias])
            added, scale = module.parts["bias"], config.scale_of(module.name)
            views[bias] = Shifted(below.dtype, below.shape, below, added, scale)
    made = {key: f"{type(view).__name__} {_numbers(view)}" for key, view in views.items()}
    return replace(
        base,
        url=f"{base.url}+{adapter.url}",
        views={**base.views, **views},
        others=(*base.others, adapter),
        notices=(*base.notices, *adapter.notices),
        settings="\n".join([base.settings, json.dumps(made, sort_keys=True)]).strip(),
    )


def _numbers(view: View) -> str:
    if isinstance(view, LowRank):
        return f"{view.scale!r} {view.swapped} {view.magnitude is not None}"
    return repr(view.scale) if isinstance(view, Shifted) else ""


def _sort(adapter: Checkpoint) -> _Sorted:
    found = _Sorted()
    for key, info in adapter.tensors.items():
        name = key.removeprefix(_PREFIX).replace(".default.", ".")
        name = name.removesuffix(".default")
        for module, role, embedding in _role(name):
            entry = found.modules.setdefault(module, _Module(module))
            entry.parts[role] = Part(info, 1)
            entry.embedding |= embedding
            break
        else:
            if any(mark in f".{name}" for mark in _UNKNOWN):
                raise CheckpointError(
                    f"{adapter.url} has a tensor of a kind that isn't known: {key[:200]}.",
                    fix="merge it into its base with peft's merge_and_unload(), and name that",
                )
            found.replaced[_unwrapped(name)] = Part(info, 1)
    if not found.modules and not found.replaced:
        raise MalformedCheckpoint(f"{adapter.url} holds no adapter weights.")
    return found


def _role(name: str) -> Iterator[tuple[str, str, bool]]:
    for ending, role in _ROLES.items():
        if name.endswith(f".{ending}"):
            yield _unwrapped(name.removesuffix(f".{ending}")), role, "embedding" in ending


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(f".{wrapper}", ".")
    return name


def _own_names(
    base: Checkpoint,
    presented: Mapping[str, TensorInfo | View],
    found: _Sorted,
    place: str,
) -> dict[str, str]:
    """The model's name of every tensor that the adapter changes -> the base's key."""
    wanted: dict[str, TensorInfo] = {name: part.info for name, part in found.replaced.items()}
    for module in found.modules.values():
        for last, role in (("weight", "a"), ("bias", "bias")):
            if role in module.parts:
                wanted.setdefault(f"{module.name}.{last}", module.parts[role].info)
    match = match_names(
        presented, wanted, base_config=base.config, other_config={"tie_word_embeddings": False}
    )
    keys = {own: key for key, own in match.own.items()}
    lost = [name for name in wanted if name not in keys or keys[name] not in presented]
    lost = [name for name in lost if name not in found.replaced or name not in keys]
    if lost:
        raise CheckpointError(
            f"{place} changes {len(lost)} tensors that {base.url} doesn't have.",
            listed(lost),
            fix="name the base that the adapter was trained on, in the layout that it had then",
        )
    return keys


def _changed(
    inner: View, module: _Module, config: AdapterConfig, place: str, *, swapped: bool
) -> View:
    parts, key = module.parts, module.name
    if "a" not in parts or "b" not in parts:
        raise MalformedCheckpoint(f"{place} has only half of the pair for {key}.")
    a, b = parts["a"], parts["b"]
    rank = config.rank_of(key)
    if a.info.shape[:1] != (rank,) or b.info.shape[1:2] != (rank,):
        raise MalformedCheckpoint(
            f"{place} has a pair of another rank than its config says for {key}.",
            f"{a.info.shape} and {b.info.shape}; r is {rank}",
        )
    inputs, outputs = _sides(module)
    flat = len(inner.shape) == 2
    turned = flat and (module.embedding or swapped)
    fits = inner.elements == inputs * outputs and inner.shape[:1] == (
        inputs if turned else outputs,
    )
    magnitude = parts.get("magnitude")
    if len(inner.shape) < 2 or not fits or (magnitude and magnitude.info.elements != outputs):
        raise CheckpointError(
            f"{place} doesn't fit {key}.",
            f"{' x '.join(map(str, inner.shape))} in the base",
            f"{outputs} x {inputs} in the adapter",
            fix="name the base that the adapter was trained on",
        )
    scale = config.scale_of(key)
    return LowRank(inner.dtype, inner.shape, inner, a, b, scale, turned, magnitude)


def _sides(module: _Module) -> tuple[int, int]:
    """Inputs and outputs of the adapter's pair."""
    a, b = module.parts["a"].info, module.parts["b"].info
    return a.elements // max(a.shape[0], 1), b.elements // max(b.shape[1], 1)


def _stored_swapped(
    presented: Mapping[str, TensorInfo | View],
    found: _Sorted,
    keys: Mapping[str, str],
    config: AdapterConfig,
) -> bool:
    """Are the base's matrices stored inputs x outputs, as GPT-2's are? Those that aren't square
    show it; the config's word counts only without them."""
    for module in found.modules.values():
        shape = presented[keys[f"{module.name}.weight"]].shape
        pair = {"a", "b"} <= module.parts.keys()
        if pair and not module.embedding and len(shape) == 2 and shape[0] != shape[1]:
            return shape == _sides(module)
    return config.fan_in_fan_out
