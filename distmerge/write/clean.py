"""What a killed run left in an output, and its removal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from distmerge.checkpoints.spool import remove_abandoned
from distmerge.checkpoints.store import OutputStore, StorageOptions
from distmerge.errors import OutputError
from distmerge.write.index import INDEX_FILE, SINGLE_FILE
from distmerge.write.lease import LEASE_FILE, lease, read_lease
from distmerge.write.local_output import LocalOutput
from distmerge.write.manifest import EVENTS_FILE, MANIFEST_FILE, Manifest
from distmerge.write.output import open_output
from distmerge.write.publish import clean_staging, is_staged, shard_count

_OF = re.compile(r"-of-(\d{5,6})\.safetensors\.json$")
_UNITS = re.compile(rb'^\{"event": "plan", .*?"units": (\d{1,6})\b', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What was removed."""

    files: tuple[str, ...]
    """Receipts, staged and finished shards of a model that was never published."""
    unfinished: int
    """Temporary files, uploads that were never completed, working branches, inputs that a sweep
    kept there."""


def clean(out: str, *, storage_options: StorageOptions | None = None) -> Cleaned:
    """Remove what killed runs left at `out`; what is published stays, and so does what no run of
    distmerge has written.

    Raises
        OutputLocked: a run is writing there.
        OutputError: nothing is there; the place can't be reached or written; its index is none.
    """
    output = open_output(out, storage_options)
    spools = remove_abandoned(Path(output.root)) if isinstance(output, LocalOutput) else 0
    if isinstance(output, LocalOutput) and not os.path.isdir(output.root):
        raise OutputError(f"Nothing is at {out}.", fix="check the path")
    began = read_lease(output) is not None
    if not began and not output.list():
        return Cleaned((), output.remove_temporaries() + spools)  # nothing to hold a lease in
    with lease(output):
        files = output.list()
        stale = sorted(leftovers(output, files, began=began))
        for path in stale:
            output.delete(path)
        unfinished = output.remove_temporaries() + spools
        clean_staging(output)
    return Cleaned(tuple(stale), unfinished)


def leftovers(output: OutputStore, files: Iterable[str], *, began: bool) -> set[str]:
    """Files of runs that didn't end; of shards those that what lies there of a run tells of.

    began: whether a run's lease was there.
    """
    staged = {path for path in files if is_staged(path)} - {LEASE_FILE}
    if not staged and not began:
        return set()
    if SINGLE_FILE in files:
        named = {SINGLE_FILE}
    elif INDEX_FILE in files:
        named = _in_index(output)
    else:
        named = set()
    counts = _counts_begun(output, staged)
    stale = staged | {path for path in files if shard_count(path) in counts} - named
    if not named:
        stale |= {path for path in files if path == EVENTS_FILE}
    if not named and MANIFEST_FILE in files:
        written = Manifest.from_json(output.read_bytes(MANIFEST_FILE)).files
        stale |= {MANIFEST_FILE, *(path for path in written if path in files)}
    return stale


def _counts_begun(output: OutputStore, staged: Iterable[str]) -> set[int]:
    """How many shards there are in each run that receipts, or logs where none is whole, tell of."""
    counts = {int(found[1]) for path in staged if (found := _OF.search(path))}
    for path in staged:
        if path.endswith("/events.jsonl"):
            counts |= {int(n) for n in _UNITS.findall(output.read_bytes(path))}
    return counts - {1}  # an only one has no number


def _in_index(output: OutputStore) -> set[str]:
    """The shards of a published model."""
    try:
        found = set(json.loads(output.read_bytes(INDEX_FILE))["weight_map"].values())
        if not all(isinstance(path, str) for path in found):
            raise TypeError
        return found
    except (ValueError, TypeError, KeyError, AttributeError):
        raise OutputError(
            f"{output.root}/{INDEX_FILE} isn't an index, so what belongs to a model can't be told.",
            fix="remove it, then what lies there is no model; or merge again with --overwrite",
        ) from None
