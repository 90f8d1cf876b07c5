"""Whether a sweep's inputs are kept on this machine's disk while they are needed, where, and how
much of them that is. What reads and writes there is `checkpoints/spool.py`.

Inputs that lie on disks aren't: the system keeps of them what it has memory for.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmerge.checkpoints import spool
from distmerge.checkpoints.location import is_remote
from distmerge.checkpoints.tensors import Checkpoint
from distmerge.errors import OutputError
from distmerge.plan.plan import Plan
from distmerge.plan.sizes import format_size, parse_size
from distmerge.run.events import Event, Listener
from distmerge.run.options import MergeOptions
from distmerge.sweeps.inputs import remote_spans
from distmerge.write.local_output import LocalOutput
from distmerge.write.output import open_output

NOWHERE = "none"
MARGIN = 1 << 30
"""Bytes of a disk that are left free, unless a size is given."""
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Scratch:
    """Where the spool may be, and how large, as the user says."""

    folder: str | None = None
    """None is the output's, or the system's for temporary files; `none` is nowhere."""
    size: str | int | None = None
    """None is what is free there, but for a margin."""

    def __post_init__(self) -> None:
        """Raises RecipeError: the size is none."""
        if self.folder is not None:
            object.__setattr__(self, "folder", os.fspath(self.folder))
        if self.size is not None:
            parse_size(self.size)

    @property
    def asked(self) -> bool:
        """Did the user ask for one?"""
        return self.folder != NOWHERE and (self.folder, self.size) != (None, None)


ANYWHERE = Scratch()


@dataclass(frozen=True)
class Spool:
    """What was decided."""

    place: str
    """Of the spool's folders, one on each machine."""
    limit: int
    """Bytes that may be in it."""
    nbytes: int | None = None
    """Bytes that will be; None where that isn't known before."""
    names: frozenset[str] | None = None
    """Of the files that are of use; None where that isn't known."""
    asked: bool = False
    """Is it an error if it can't be made?"""

    @property
    def folder(self) -> str:
        """Where it lies."""
        return str(Path(self.place).parent)

    def __str__(self) -> str:
        size = "" if self.nbytes is None else f"{format_size(self.nbytes)} "
        return f"{size}in {self.folder}, and at most {format_size(self.limit)}"

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {"folder": self.folder, "bytes": self.nbytes, "allowed": self.limit}


def place_for(scratch: Scratch, out: str | None) -> str | None:
    """The place of the spool of a sweep to `out`, whether it comes to be or not."""
    if scratch.folder == NOWHERE:
        return None
    output = open_output(out) if out is not None else None
    local = isinstance(output, LocalOutput)
    told = os.path.abspath(output.root) if local and output else str(out)
    folder = scratch.folder or (told if local else tempfile.gettempdir())
    name = hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
    return os.path.join(os.path.abspath(os.path.expanduser(folder)), spool.PREFIX + name)


def through_spool(checkpoint: Checkpoint, place: str | None) -> Checkpoint:
    """The model, read through the spool where it comes over a network."""
    remote = any(is_remote(one.root) for one in (checkpoint, *checkpoint.others))
    return checkpoint.spooled(place) if place is not None and remote else checkpoint


def plan_spool(
    plans: Sequence[Plan],
    scratch: Scratch,
    place: str | None,
    *,
    comparing: bool,
    written: int,
    out: str | None,
) -> Spool | str | None:
    """The spool of a sweep whose inputs are read more than once; None if none of them is remote; a
    sentence if they will be read again.

    comparing: are candidates compared with their parents?
    written: bytes that are written to `out`.

    Raises
        OutputError: one was asked for, and there is no room for it.
    """
    spans = remote_spans(plans, comparing=comparing)
    if not spans:
        return None
    if place is None:
        return "by each candidate, as --scratch none says"
    needed = sum(stop - start for several in spans.values() for start, stop in several)
    names = frozenset(spool.spooled_name(root, file) for root, file in spans)
    folder = str(Path(place).parent)
    limit = _limit(scratch, place, written if out and _same_disk(folder, out) else 0)
    if not scratch.asked and is_in_memory(folder):
        return f"by each candidate: {folder} lies in memory (--scratch DIR)"
    if needed <= limit:
        return Spool(place, limit, needed, names, scratch.asked)
    told = f"{format_size(needed)} of inputs don't fit into the {format_size(limit)} of {folder}"
    if not scratch.asked:
        return f"by each candidate: {told} (--scratch DIR)"
    again = "or --scratch none to read them from the store again"
    if scratch.size is None:
        fact = "what is free there counts, but for 1 GiB and for what is written there"
        raise OutputError(
            f"The sweep's {told}.", fact, fix=f"--scratch DIR with more room, {again}"
        )
    enough = f"--scratch-size {-(-needed // 10**6)}MB"
    raise OutputError(f"The sweep's {told}.", "--scratch-size says so", fix=f"{enough}, {again}")


def open_spool(scratch: Scratch, out: str) -> Spool | None:
    """The spool of a search, whose candidates aren't known: what it has no room for is read
    again."""
    place = place_for(scratch, out)
    folder = str(Path(place).parent) if place else ""
    if place is None or (not scratch.asked and is_in_memory(folder)):
        return None
    return Spool(place, _limit(scratch, place, 0), asked=scratch.asked)


@contextmanager
def spooling(wanted: Spool | None, settings: MergeOptions, listener: Listener) -> Iterator[None]:
    """Have the spool while this lasts, on every machine that reads."""
    if wanted is None:
        yield
        return
    with ExitStack() as stack:
        try:
            lock = spool.make(wanted.place, limit=wanted.limit, wanted=wanted.names)
        except OSError as error:
            if wanted.asked:
                raise OutputError(
                    f"The scratch folder {wanted.folder} can't be used.",
                    str(error),
                    fix="--scratch DIR on a disk of this machine",
                ) from None
            told = f"Inputs are read again, since {wanted.folder} can't be used: {error}"
            listener(Event("notice", {"text": told}))
            yield
            return
        stack.callback(spool.remove, wanted.place)
        stack.enter_context(lock)
        if settings.engine == "ray" and settings.address is not None:
            from distmerge.sweeps.ray_spool import elsewhere

            stack.enter_context(elsewhere(wanted, settings, listener))
        yield
        if spool.was_full(wanted.place):
            told = f"{wanted.folder} was full: some inputs were read again (--scratch-size)"
            listener(Event("notice", {"text": told}))


def is_in_memory(folder: str) -> bool:
    """Does what is written there take memory? False where that can't be told."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return False
    path = os.path.realpath(folder)
    holding = [m for m in mounts if len(m) > 2 and _is_below(path, m[1])]
    return bool(holding) and max(holding, key=lambda m: len(m[1]))[2] in _IN_MEMORY


def _is_below(path: str, mount: str) -> bool:
    return path == mount or path.startswith(mount.rstrip("/") + "/")


def _limit(scratch: Scratch, place: str, written: int) -> int:
    if scratch.size is not None:
        return parse_size(scratch.size)
    return max(0, free_bytes(place) - written)


def free_bytes(place: str) -> int:
    """That a spool may take of this machine's disk."""
    free = shutil.disk_usage(_existing(str(Path(place).parent))).free
    return max(0, free + spool.used_bytes(spool.folder_of(place)) - MARGIN)


def _same_disk(folder: str, out: str) -> bool:
    output = open_output(out)
    if not isinstance(output, LocalOutput):
        return False
    places = [os.stat(_existing(os.path.abspath(one))) for one in (folder, output.root)]
    return places[0].st_dev == places[1].st_dev


def _existing(folder: str) -> str:
    """The folder, or the nearest above it that is there."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder
