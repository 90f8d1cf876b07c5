"""Which tensors of a model's files are one tensor in transformers' own layout, and the reverse.

transformers 5 loads experts that files hold one by one as one tensor, and some files hold as one
what the model has in pieces. Its conversion mapping says which; what of it merely joins tensors
one behind the other is told here, the rest is named.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Fusion:
    """One tensor that is, row-major, others one behind the other."""

    one: str
    many: tuple[str, ...]
    """In order."""
    obstacle: str = ""
    """What else transformers does to them, if it isn't only that."""


def fusions(config: Mapping[str, Any], keys: Collection[str]) -> list[Fusion]:
    """How transformers would join, cut or rename these keys for a model of this config."""
    renamings, converters = _mapping(config)
    if not renamings and not converters:
        return []
    from transformers.core_model_loading import rename_source_key

    groups: dict[str, dict[str, list[str]]] = {}
    renamed: list[Fusion] = []
    for key in keys:
        target, pattern = rename_source_key(key, renamings, converters)
        if pattern is not None:
            groups.setdefault(target, {}).setdefault(pattern, []).append(key)
        elif target != key:
            renamed.append(Fusion(target, (key,)))
    joined = [fusion for target, by in groups.items() for fusion in _fusion(target, by, converters)]
    return [*joined, *renamed]


def _mapping(config: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and converters for the model and its parts."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # an older transformers, whose layout is that of its files
        return [], []
    names = [*(config.get("architectures") or []), config.get("model_type")]
    parts = [part for part in config.values() if isinstance(part, dict)]
    names += [part.get("model_type") for part in parts]
    found: list[Any] = []
    for name in dict.fromkeys(str(name) for name in names if name):
        found += get_checkpoint_conversion_mapping(name) or []  # type: ignore[no-untyped-call]
    converters = [item for item in found if isinstance(item, WeightConverter)]
    return [item for item in found if item not in converters], converters


def _fusion(
    target: str, by_pattern: Mapping[str, list[str]], converters: list[Any]
) -> Iterator[Fusion]:
    converter = next(c for c in converters if set(by_pattern) <= set(c.source_patterns))
    lists = [
        sorted(by_pattern[pattern], key=_natural)
        for pattern in converter.source_patterns
        if pattern in by_pattern
    ]
    flat = tuple(key for keys in lists for key in keys)
    kinds = [type(op).__name__ for op in converter.operations]
    dims = [getattr(op, "dim", None) for op in converter.operations]
    steps = list(zip(kinds, dims, strict=True))
    if steps in ([("MergeModulelist", 0)], [("Concatenate", 0)]):
        yield Fusion(target, flat)
    elif steps == [("MergeModulelist", 0), ("Concatenate", 1)] and len(set(map(len, lists))) == 1:
        yield Fusion(target, tuple(key for keys in zip(*lists, strict=True) for key in keys))
    elif steps in ([("Chunk", 0)], [("Split", 0)]) and len(flat) == 1:
        first, *others = converter.target_patterns
        yield Fusion(flat[0], (target, *(target.replace(first, name, 1) for name in others)))
    else:
        yield Fusion(target, flat, obstacle=", ".join(kinds))


def _natural(key: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
