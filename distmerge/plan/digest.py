"""What an output's bytes depend on, as one hash: resume trusts only an equal one.

In: the expression, input fingerprints, who gives the config, the seed, methods' sources, shard
layout and dtypes (the shards' headers), the format version, torch's version and instruction class,
the device.
Out: workers, engine, memory, names and places of the inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from distmerge.errors import RecipeError
from distmerge.expressions.nodes import (
    Apply,
    Binary,
    Branch,
    Leaf,
    Renumber,
    Select,
    Stack,
    TensorLeaf,
)
from distmerge.expressions.tokenizer_files import TokenizerFiles
from distmerge.methods.fusion import fused_loops

FORMAT_VERSION = 3
"""Changes when the same plan would give other bytes."""
LONGEST_SPELLING = 1 << 20
"""Characters of an operand; a longer one's hash stands for it."""


def kernel_class(device: str) -> str:
    """Processors of one class give the same bits. Raises RecipeError: no such device."""
    version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    if device.startswith("cuda"):
        if not torch.cuda.is_available() or _number(device) >= torch.cuda.device_count():
            raise RecipeError(
                f"There is no {device} device here.",
                f"torch {torch.__version__} sees {torch.cuda.device_count() or 'none'}",
                fix="--device cpu, or a torch for CUDA and its driver",
            )
        return f"torch {version} cuda {torch.cuda.get_device_name(torch.device(device))}"
    loops = "fused" if fused_loops() is not None else "plain"
    return f"torch {version} cpu {torch.backends.cpu.get_cpu_capability()} {loops}"


def _number(device: str) -> int:
    return torch.device(device).index or 0


def digest_of(
    root: Any,
    seed: int,
    headers: Iterable[bytes],
    kernel: str,
    tokenizer: TokenizerFiles | None = None,
    donor: Leaf | None = None,
) -> str:
    """32 hexadecimal digits.

    donor: of the config and the other files.
    tokenizer: the output's, where it isn't copied from the donor.
    """
    text = hashlib.blake2b(digest_size=16)
    parts = [str(FORMAT_VERSION), canonical(root), str(seed), kernel]
    parts += [tokenizer.digest] if tokenizer else []
    parts += [f"files of {canonical(donor)}"] if donor else []
    for part in parts:
        text.update(part.encode() + b"\0")
    for header in headers:
        text.update(header)
    return text.hexdigest()


def canonical(node: Any) -> str:
    """An expression's spelling with fingerprints for names."""
    if isinstance(node, Leaf):
        return f"<{node.checkpoint.fingerprint}>"
    if isinstance(node, TensorLeaf):
        return f"<{_content(node)}>"
    if isinstance(node, Binary):
        return f"({canonical(node.left)}{node.operator}{canonical(node.right)} {node.on_missing})"
    if isinstance(node, Apply):
        inputs = [f"{name}=[{','.join(map(_operand, xs))}]" for name, xs in node.inputs]
        base = canonical(node.base) if node.base is not None else "-"
        options = (node.base_index, node.on_missing, sorted(node.passthrough), node.base_listed)
        method = f"{node.method.name}@{node.method.source_hash}"
        return f"{method}({inputs} {base} {sorted(node.parameters)} {options})"
    if isinstance(node, Select):
        return f"({canonical(node.child)} {sorted(node.keys)})"
    if isinstance(node, Renumber):
        return f"({canonical(node.child)} {node.move})"
    if isinstance(node, Stack):
        parts = ",".join(map(canonical, node.parts))
        return f"stack({parts} {node.family} {node.counts})"
    if isinstance(node, Branch):
        return f"modules({','.join(map(canonical, node.parts))} {node.prefixes})"
    return repr(node)


def _operand(node: Any) -> str:
    """A method's operand; each method around it doubles the backslashes of its spelling."""
    text = canonical(node)
    if len(text) <= LONGEST_SPELLING:
        return text
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _content(leaf: TensorLeaf) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in leaf.tensors.items():
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
