"""From finished shards to a published model: everything else first, what makes it load last."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from distmerge.checkpoints.location import local_path
from distmerge.checkpoints.store import OutputStore
from distmerge.checkpoints.tensors import Checkpoint
from distmerge.errors import OutputError, OutputExists, VerificationFailed
from distmerge.write.index import INDEX_FILE, SINGLE_FILE
from distmerge.write.lease import LEASE_FILE
from distmerge.write.manifest import EVENTS_FILE, MANIFEST_FILE, Manifest
from distmerge.write.shard import STAGING

_WEIGHTS = re.compile(r"model(?:-\d{5,}-of-(\d{5,}))?\.safetensors")
_STAGED = re.compile(
    rf"{re.escape(STAGING)}/[0-9a-f]{{8,}}/"
    rf"(?:{_WEIGHTS.pattern}(?:\.json)?|answers\.json|events\.jsonl)|{re.escape(LEASE_FILE)}"
)


def is_weights(path: str) -> bool:
    """Whether a merge gives one of its shards that name."""
    return _WEIGHTS.fullmatch(path) is not None


def shard_count(path: str) -> int | None:
    """Of how many numbered shards a file is one by its name; None if it is none."""
    found = _WEIGHTS.fullmatch(path)
    return int(found[1]) if found and found[1] else None


def is_staged(path: str) -> bool:
    """Is that what a run calls a file of its own in an output? Others there are somebody's."""
    return _STAGED.fullmatch(path) is not None


@dataclass(frozen=True, slots=True)
class Published:
    """What lies in an output before a run."""

    loads: tuple[str, ...]
    """Files that make loaders see a model."""
    digest: str | None
    """Of the manifest, where there is a readable one."""
    unfinished: bool
    """Does something of a run lie there that hasn't ended?"""
    others: bool
    """Is there anything else, not of an unfinished run?"""

    def holds(self, digest: str) -> bool:
        """Is this merge there, whole?"""
        return bool(self.loads) and self.digest == digest


def look(output: OutputStore) -> Published:
    """See what an output holds.

    Raises
        OutputError: it isn't a place that files can be in.
    """
    if output.is_file():
        raise OutputError(
            f"{output.root} is a file, and a model is a folder of files.",
            fix="name a folder that doesn't exist yet",
        )
    files = output.list()
    loads = tuple(f for f in (INDEX_FILE, SINGLE_FILE) if f in files)
    digest = None
    if MANIFEST_FILE in files:
        try:
            digest = Manifest.from_json(output.read_bytes(MANIFEST_FILE)).digest
        except VerificationFailed:
            digest = None
    unfinished = any(is_staged(path) for path in files)
    others = any(not path.startswith(f"{STAGING}/") for path in files) and not unfinished
    return Published(loads, digest, unfinished, others)


def check_apart(output: OutputStore, models: Iterable[Checkpoint]) -> None:
    """Raises OutputExists if a model, or a file that it links to, is read from where the output
    goes: it would be deleted before it is read."""
    if _place(output.root) in {place for model in models for place in _places(model)}:
        raise OutputExists(
            f"{output.root} holds one of the models that are to be merged.",
            fix="choose another output",
        )


def check_intermediate(output: OutputStore, out: str, models: Iterable[Checkpoint]) -> None:
    """Raises OutputExists: an intermediate merge would be written over a model, or where the merge
    that uses it goes."""
    check_apart(output, models)
    if _place(output.root) == _place(out):
        raise OutputExists(
            f"{output.root} is where an intermediate merge goes, and the merge itself.",
            fix="choose another output, or another folder for intermediate merges",
        )


def check_outside(place: str, what: str, models: Iterable[Checkpoint]) -> None:
    """Raises OutputError if a place is a model's folder or in one: it would be a part of it."""
    wanted = _place(place)
    for model in models:
        root = _place(model.root)
        if not model.is_lone_file and f"{wanted}/".startswith(f"{root}/"):
            raise OutputError(
                f"{what} {place} is in the folder of {model.url}, which is to be merged.",
                fix="name a place outside of the models",
            )


def check_names(output: OutputStore, paths: Iterable[str]) -> None:
    """Raises OutputError if folders are in the way of files of these names."""
    folders = output.folders_among(paths)
    if folders:
        raise OutputError(
            f"{output.root} has folders where files are to be written.",
            ", ".join(folders),
            fix="remove them, or choose another output",
        )


def _places(model: Checkpoint) -> Iterator[str]:
    """Of its files."""
    root = _place(model.root)
    yield root
    if "://" not in root:
        for path in model.files:
            yield os.path.dirname(os.path.realpath(os.path.join(root, path)))


def _place(root: str) -> str:
    if root.startswith("file://"):
        root = local_path(root)
    return root.rstrip("/") if "://" in root else os.path.realpath(root)


def check_free(output: OutputStore, found: Published, *, overwrite: bool) -> None:
    """Raises OutputExists if something would be lost."""
    if overwrite or not (found.loads or found.others):
        return
    what = "holds a model" if found.loads else "isn't empty"
    raise OutputExists(
        f"{output.root} {what} already.",
        fix="--overwrite (overwrite=True) replaces it, or choose another output",
    )


def check_room(output: OutputStore, shards: Sequence[int], writers: int) -> None:
    """Raises OutputError if shards of so many bytes won't fit. Weights that are there already are
    either part of the output or go before it is written. Where shards only wait on their way, it
    is one for each writer."""
    free = output.free_bytes()
    if free is None:
        return
    if output.spools:
        nbytes, place = sum(sorted(shards)[-writers:]), "The temporary folder"
    else:
        nbytes, place = sum(shards), output.root
        free += sum(info.size for path, info in output.list().items() if _WEIGHTS.search(path))
    if nbytes > free:
        raise OutputError(
            f"{place} has no room for this merge.",
            f"needed {nbytes / 1e9:.2f} GB",
            f"free   {free / 1e9:.2f} GB",
            fix="point TMPDIR at another disk, or choose a smaller --max-shard-size"
            if output.spools
            else "free some, choose another disk, or --out-dtype bfloat16",
        )


def unpublish(output: OutputStore, found: Published) -> None:
    """Take an old model out of sight, what makes it load first, so that no crash leaves an
    index over mixed shards; then the other files that its manifest names."""
    files: list[str] = []
    if found.digest is not None:
        files = [EVENTS_FILE, *Manifest.from_json(output.read_bytes(MANIFEST_FILE)).files]
    for path in (*found.loads, *sorted(set(files) - set(found.loads)), MANIFEST_FILE):
        output.delete(path)


def clear_stale(output: OutputStore, digest: str, shards: Collection[str]) -> None:
    """Remove what other merges, killed or overwritten, left: their receipts first, since the
    shards that those vouch for are about to be written over, then shards that this merge
    doesn't have."""
    for path in output.list(f"{STAGING}/"):
        ours = is_staged(path) and path != LEASE_FILE
        if ours and not path.startswith(f"{STAGING}/{digest}/"):
            output.delete(path)
    for path in output.list():
        if is_weights(path) and path not in shards:
            output.delete(path)


def publish(
    output: OutputStore,
    *,
    files: Mapping[str, bytes],
    manifest: Manifest,
    index: bytes | None,
    staged: str | None,
    text: str = "",
) -> str | None:
    """Write the small files, the manifest and, last, what makes the model load: the index over
    shards that lie in place already, or the lone shard that waits at `staged`.

    Returns the URL to read it from, if that isn't the output's own.
    """
    for path, data in files.items():
        output.write_bytes(path, data)
    output.write_bytes(MANIFEST_FILE, manifest.to_json())
    if staged is not None:
        output.move(staged, SINGLE_FILE)
    if index is not None:
        output.write_bytes(INDEX_FILE, index)
    return output.publish("Merge by distmerge", text)


def clean_staging(output: OutputStore) -> None:
    """Remove receipts and whatever else belonged to the run rather than to its result."""
    found = output.list(f"{STAGING}/")
    if all(is_staged(path) for path in found):
        output.remove_below(f"{STAGING}/")  # and whatever else the store keeps there
        return
    for path in filter(is_staged, found):
        output.delete(path)
