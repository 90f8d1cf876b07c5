"""`distmerge inspect`, `distmerge verify` and `distmerge clean`."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distmerge.cli import options
from distmerge.cli.failures import BROKEN, reported
from distmerge.plan.sizes import format_size
from distmerge.run.progress import INTERVAL, printable

if TYPE_CHECKING:
    from distmerge.checkpoints.tensors import Checkpoint


@reported
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A path, URL or Hub id.")],
    keys: Annotated[bool, typer.Option("--keys", help="List every tensor.")] = False,
    as_json: options.AsJson = False,
    trace: options.Trace = False,
) -> None:
    """Show what a model holds, from its headers."""
    from distmerge.checkpoints.opening import open_checkpoint

    checkpoint = open_checkpoint(model)
    found = _summary(checkpoint)
    listed = {
        key: {"dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
        for key, info in checkpoint.tensors.items()
    }
    if as_json:
        found |= {"keys": listed} if keys else {}
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    from distmerge.cli.tables import console, table

    notices = found.pop("notices")
    dtypes = found.pop("dtypes")
    out = console()
    rows = [(name, _shown(value)) for name, value in found.items()]
    out.print(table("", ("what", "it is"), rows))
    counts = [(name, *count.values()) for name, count in dtypes.items()]
    out.print(table("", ("dtype", "tensors #", "parameters #", "bytes #"), counts))
    if keys:
        places = [(key, *info.values()) for key, info in listed.items()]
        out.print(table("", ("key", "dtype", "shape", "bytes #"), places))
    for text in notices:
        print(printable(f"Note: {text}"))


def _summary(checkpoint: Checkpoint) -> dict[str, Any]:
    from distmerge.methods.parameters import Layers

    tensors = checkpoint.tensors.values()
    files = sorted({info.file for info in tensors})
    config = checkpoint.config or {}
    dtypes: dict[str, dict[str, int]] = {}
    for info in tensors:
        count = dtypes.setdefault(info.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        count["tensors"] += 1
        count["parameters"] += info.elements
        count["bytes"] += info.nbytes
    safe = all(file.endswith(".safetensors") for file in files)
    return {
        "url": checkpoint.url,
        "root": checkpoint.root,
        "revision": checkpoint.revision,
        "fingerprint": checkpoint.fingerprint,
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "format": "safetensors" if safe else "PyTorch",
        "files": len(files),
        "tensors": len(tensors),
        "parameters": sum(info.elements for info in tensors),
        "bytes": checkpoint.nbytes,
        "dtypes": dtypes,
        "layers": dict(Layers.of(checkpoint.tensors).counts),
        "aliases": dict(checkpoint.aliases),
        "notices": list(checkpoint.notices),
    }


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {kept}" for name, kept in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)


@reported
def verify(
    out: Annotated[str, typer.Argument(metavar="OUT", help="What a merge has written.")],
    as_json: options.AsJson = False,
    trace: options.Trace = False,
) -> None:
    """Read an output again and check it all.

    Checksums, completeness, NaN, and whether it loads; exits with 1 if anything is wrong.
    """
    from distmerge.write.verify import verify as read_again

    found = read_again(out, on_bytes=_Ticker())
    if as_json:
        told = {
            "ok": found.ok,
            "problems": found.problems,
            "notes": found.notes,
            "files": found.files,
            "tensors": found.tensors,
            "bytes": found.nbytes,
        }
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        for text in (*found.problems, *(f"Note: {note}" for note in found.notes)):
            print(printable(text))
        read = f"{found.tensors} tensors in {found.files} files, {format_size(found.nbytes)} read"
        count = len(found.problems)
        state = "whole" if found.ok else f"not whole, {count} problem{'s' if count > 1 else ''}"
        print(printable(f"{out} is {state}: {read}."))
    if not found.ok:
        raise typer.Exit(BROKEN)


@reported
def clean(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where merges were written.")],
    as_json: options.AsJson = False,
    trace: options.Trace = False,
) -> None:
    """Remove what killed merges left behind.

    Receipts, shards without an index, temporary files, unfinished uploads, working branches, inputs
    that a sweep kept there. What is published stays. Refuses while a merge is running there.
    """
    from distmerge.write.clean import clean as remove

    found = remove(out)
    if as_json:
        print(json.dumps({"files": found.files, "unfinished": found.unfinished}, indent=2))
        return
    for path in found.files:
        print(printable(f"Removed {path}"))
    count = found.unfinished
    print(printable(f"{out}: {len(found.files)} files and {count} unfinished things removed."))


class _Ticker:
    """A line every few seconds, while bytes are read."""

    def __init__(self) -> None:
        self._read = 0
        self._started = self._last = time.monotonic()

    def __call__(self, count: int) -> None:
        self._read += count
        now = time.monotonic()
        if now - self._last >= INTERVAL:
            self._last = now
            rate = int(self._read / (now - self._started))
            text = f"{format_size(self._read)} read ({format_size(rate)}/s)"
            print(text, file=sys.stderr, flush=True)
