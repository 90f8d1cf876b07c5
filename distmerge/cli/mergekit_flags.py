"""The boundary between the command line of mergekit and ours: what its users type works here.

A flag that has an equal is read as that; one that isn't needed is answered with a sentence; one
that would change the result is refused.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from distmerge.run.progress import printable

RENAMED: Mapping[str, str] = {
    "--random-seed": "--seed",
    "--out-shard-size": "--max-shard-size",
    "--num-threads": "--workers",
    "-j": "--workers",
    "--intermediate-dir": "--keep-intermediates",
    "-I": "--keep-intermediates",
}
"""Flags with a value -> ours that take the same."""
SWITCHES: Mapping[str, Sequence[str]] = {
    "--cuda": ("--device", "cuda"),
    "--gpu-rich": ("--device", "cuda"),
}
"""Flags without a value -> what we call that."""
_ALWAYS_SMALL = "memory is bounded by --allowed-mem, whatever computes"
_ONE_DEVICE = "one device merges at a time; --engine ray spreads a merge over machines"
_NO_COPY = "nothing is downloaded whole or kept; tensors are read where they lie"
_ADAPTERS = "adapters are added tensor by tensor while their base is read, in float32"
ANSWERS: Mapping[str, str | None] = {
    "--copy-tokenizer": None,
    "--write-model-card": None,
    "--safe-serialization": None,
    "--no-quiet": None,
    "--no-cuda": None,
    "--no-allow-crimes": None,
    "--no-unsafe-truncate-embeddings": None,
    "--no-trust-remote-code": None,
    "--no-low-cpu-memory": None,
    "--no-lazy-unpickle": None,
    "--no-read-to-gpu": None,
    "--no-multi-gpu": None,
    "--no-async-write": None,
    "--no-clone-tensors": None,
    "--no-lazy": None,
    "--no-copy-tokenizer": "the tokenizer is always copied: a model doesn't work without",
    "--no-write-model-card": "a model card is always written",
    "--no-safe-serialization": "outputs are always safetensors",
    "--allow-crimes": "no model is judged by its architecture's name, but by its tensors",
    "--trust-remote-code": "merging never runs the code of a model",
    "--low-cpu-memory": _ALWAYS_SMALL,
    "--read-to-gpu": _ALWAYS_SMALL,
    "--lazy-unpickle": "PyTorch files are never unpickled; their tensors are read one by one",
    "--multi-gpu": _ONE_DEVICE,
    "--clone-tensors": "a layer may come several times anyway",
    "--async-write": "writing overlaps with merging anyway",
    "--lazy": "finished work is never repeated anyway",
    "--verbose": "'distmerge plan' and 'distmerge explain' tell what will be done",
    "-v": "'distmerge plan' and 'distmerge explain' tell what will be done",
}
"""Flags without a value that nothing needs -> why; None where what they ask for happens anyway."""
ANSWERS_WITH_VALUE: Mapping[str, str] = {
    "--transformers-cache": _NO_COPY,
    "--lora-merge-cache": _ADAPTERS,
    "--lora-merge-dtype": _ADAPTERS,
    "--write-threads": "writing overlaps with merging anyway",
}
REFUSED: Mapping[str, str] = {
    "--unsafe-truncate-embeddings": "tokenizer: {source: base} in the recipe aligns vocabularies",
}
_VERBOSE = re.compile(r"-v+")
OUT = "--out-path"
"""mergekit-multi's spelling of OUT."""


def translated(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our arguments for mergekit's, and a sentence for each that has no effect.

    Raises
        typer.BadParameter: a flag that would change the result in a way that we don't offer.
    """
    found: list[str] = []
    notes: list[str] = []
    rest = list(given)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*found, argument, *rest], notes
        flag, equals, value = argument.partition("=")
        if flag in REFUSED:
            raise typer.BadParameter(f"{flag} would change the result. Fix: {REFUSED[flag]}")
        if flag in RENAMED or flag in ANSWERS_WITH_VALUE or flag == OUT:
            value = value if equals else rest.pop(0) if rest else ""
            if flag in RENAMED:
                found += [RENAMED[flag], value]
            elif flag == OUT:
                found.append(value)
            else:
                notes.append(f"{flag} is not needed: {ANSWERS_WITH_VALUE[flag]}.")
        elif argument in SWITCHES:
            found += SWITCHES[argument]
        elif argument in ANSWERS or _VERBOSE.fullmatch(argument):
            answer = ANSWERS.get(argument, ANSWERS["-v"])
            notes += [f"{argument} is not needed: {answer}."] if answer else []
        else:
            found.append(argument)
    return found, notes


class MergekitCommand(TyperCommand):
    """A command that mergekit's flags may be given to."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Translate, tell, and go on as always."""
        found, notes = translated(args)
        for text in [] if "--quiet" in found else notes:
            print(printable(f"Note: {text}"), file=sys.stderr, flush=True)
        return super().parse_args(ctx, found)
