"""The boundary between an output and the trust that is put in it: everything is read again.

Bytes against checksums, headers against the index, values against NaN, the config against what
was written, the names against what transformers will look for. Nothing is taken from the run
that wrote the output but its manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from distmerge.checkpoints.location import is_safe_path, locate
from distmerge.checkpoints.opening import open_store
from distmerge.checkpoints.safetensors_header import read_header
from distmerge.checkpoints.store import StorageOptions, Store
from distmerge.checkpoints.tensors import FileInfo, TensorInfo
from distmerge.credentials import redact
from distmerge.errors import DistmergeError, VerificationFailed
from distmerge.write.config import config_dtype, written_dtype
from distmerge.write.donor_files import is_weights
from distmerge.write.index import INDEX_FILE
from distmerge.write.manifest import EVENTS_FILE, MANIFEST_FILE, Manifest, ShardRecord
from distmerge.write.reread import READS_IN_FLIGHT, reread

MOST_OF_A_KIND = 20
"""Problems of one kind that are listed; the rest are counted."""

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Verification:
    """What reading an output again has shown."""

    problems: list[str]
    """One sentence each, naming the file or the key; none if the output is what it should be."""
    notes: list[str]
    """What could not be checked, or is unusual and harmless."""
    files: int
    """Files read."""
    tensors: int
    """Tensors found in the shards."""
    nbytes: int
    """Bytes read."""

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


def verify(
    url: str,
    *,
    storage_options: StorageOptions | None = None,
    on_bytes: OnBytes | None = None,
) -> Verification:
    """Read an output again, all of it, a few pieces of 8 MiB in memory at a time.

    Args
        url: what was given as the merge's output: a directory, an fsspec URL or a Hub id.
        on_bytes: called with the number of bytes each time some were checked.

    Raises
        CheckpointNotFound, AccessDenied: nothing can be read there at all. A broken output is
            no exception: its problems are in the result.
    """
    location = locate(url)
    store = open_store(location.root, storage_options, revision=location.revision)
    try:
        check = _Check(store, dict(store.files()), on_bytes or (lambda count: None))
        manifest = check.read_manifest(redact(url))
        if manifest is not None:
            check.check_all(manifest, location.root if location.kind == "local" else None)
        return check.result()
    finally:
        store.close()


@dataclass
class _Check:
    store: Store
    files: dict[str, FileInfo]
    on_bytes: OnBytes
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    nbytes: int = 0
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)
    """Shards whose tensors are not known."""

    def result(self) -> Verification:
        problems = list(dict.fromkeys(self.problems))
        return Verification(problems, self.notes, len(self.read), len(self.tensors), self.nbytes)

    def read_manifest(self, url: str) -> Manifest | None:
        if MANIFEST_FILE not in self.files:
            self.problems.append(f"There is no {MANIFEST_FILE} in {url}: no merge, or half of one.")
            return None
        data = self.read_small(MANIFEST_FILE)
        if data is None:
            return None
        try:
            return Manifest.from_json(data)
        except VerificationFailed as error:
            self.problems.append(_sentence(error))
            return None

    def check_all(self, manifest: Manifest, directory: str | None) -> None:
        with ThreadPoolExecutor(READS_IN_FLIGHT, "distmerge-verify") as pool:
            for shard in manifest.shards:
                self.check_shard(shard, pool)
            for path, expected in manifest.files.items():
                if (info := self.present(path)) is not None:
                    self.check_content(info, expected, {}, pool)
        if len(manifest.shards) > 1:
            self.check_index({shard.file for shard in manifest.shards})
        self.check_strays(manifest)
        self.check_config(directory)

    def check_shard(self, shard: ShardRecord, pool: ThreadPoolExecutor) -> None:
        self.unreadable.add(shard.file)
        if (info := self.present(shard.file)) is None:
            return
        if info.size != shard.size:
            self.problems.append(
                f"{shard.file} has {info.size:,} bytes; {MANIFEST_FILE} says {shard.size:,}."
            )
        try:
            tensors, _ = read_header(self.reader(info), info.size, info.path)
        except DistmergeError as error:
            self.problems.append(_sentence(error))
            tensors = {}
        else:
            self.unreadable.remove(shard.file)
            self.check_keys(shard, tensors)
        self.check_content(info, shard.checksum, tensors, pool)

    def check_keys(self, shard: ShardRecord, tensors: Mapping[str, TensorInfo]) -> None:
        listed = set(shard.tensors)
        self.report(f"{shard.file} lacks {key!r}." for key in shard.tensors if key not in tensors)
        self.report(
            f"{shard.file} holds {key!r}, which {MANIFEST_FILE} doesn't list."
            for key in tensors
            if key not in listed
        )
        self.report(
            f"{key!r} is in {self.tensors[key].file} and in {shard.file}."
            for key in tensors
            if key in self.tensors
        )
        self.tensors.update(tensors)

    def check_content(
        self,
        info: FileInfo,
        expected: str,
        tensors: Mapping[str, TensorInfo],
        pool: ThreadPoolExecutor,
    ) -> None:
        try:
            content = reread(self.store, info, tensors, pool, self.count)
        except DistmergeError as error:
            self.problems.append(_sentence(error))
            return
        self.read.add(info.path)
        if content.checksum != expected:
            self.problems.append(f"{info.path} was changed after it was written (its checksum).")
        self.report(f"{info.path}: {key!r} holds NaN or infinity." for key in content.non_finite)

    def count(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self.on_bytes(nbytes)

    def check_index(self, shards: set[str]) -> None:
        if self.present(INDEX_FILE) is None or (index := self.read_json(INDEX_FILE)) is None:
            return
        weight_map, metadata = index.get("weight_map"), index.get("metadata")
        if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
            self.problems.append(f"{INDEX_FILE} lacks its weight_map or its metadata.")
            return
        found = {key: info.file for key, info in self.tensors.items()}
        self.report(
            f"{INDEX_FILE} lacks {key!r} of {file}."
            for key, file in found.items()
            if key not in weight_map
        )
        self.report(
            f"{INDEX_FILE} names {file!r} for {key!r}, which is not there."
            for key, file in weight_map.items()
            if found.get(key) != file and not (key not in found and str(file) in self.unreadable)
        )
        total, written = metadata.get("total_size"), sum(i.nbytes for i in self.tensors.values())
        if total != written and not self.unreadable & shards:
            self.problems.append(
                f"{INDEX_FILE} says total_size {total!r}; the tensors have {written} bytes."
            )

    def check_strays(self, manifest: Manifest) -> None:
        expected = {MANIFEST_FILE, EVENTS_FILE, *manifest.files}
        expected |= {shard.file for shard in manifest.shards}
        if len(manifest.shards) > 1:
            expected.add(INDEX_FILE)
        for path in self.files:
            if path in expected or path.startswith("."):
                continue
            # Loaders look beside the index, not below it.
            picked_up = "/" not in path and (is_weights(path) or path == "adapter_config.json")
            if picked_up:
                self.problems.append(
                    f"{path} is not part of the merge, and loaders may take it for its weights."
                )
            else:
                self.notes.append(f"{path} is not part of the merge.")

    def check_config(self, directory: str | None) -> None:
        if "config.json" not in self.files:
            self.notes.append("Not checked: whether it loads, since there is no config.json.")
            return
        if self.unreadable or (config := self.read_json("config.json")) is None:
            return
        dtypes = {key: info.dtype for key, info in self.tensors.items()}
        sizes = {key: info.nbytes for key, info in self.tensors.items()}
        said, written = config_dtype(config), written_dtype(dtypes, sizes)
        if said is None:
            self.notes.append("config.json names no dtype.")
        elif written is not None and said != written:
            self.problems.append(f"config.json says {said}; what was written is {written}.")
        self.check_loading(config, directory)

    def check_loading(self, config: Mapping[str, Any], directory: str | None) -> None:
        from distmerge.huggingface import check_loads

        names = config.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self.problems.append(f"config.json: architectures is {names!r}, not a list of names.")
            return
        found = check_loads(config, self.tensors, directory=directory)
        unknown = [sentence for sentence in found if sentence.startswith("not checked:")]
        self.notes += unknown
        self.report(
            f"It doesn't load as it should: {sentence}."
            for sentence in found
            if sentence not in unknown
        )

    def present(self, path: str) -> FileInfo | None:
        if path not in self.files or not is_safe_path(path):
            self.problems.append(f"{path} is missing.")
            return None
        return self.files[path]

    def report(self, sentences: Iterable[str]) -> None:
        found = list(sentences)
        self.problems += found[:MOST_OF_A_KIND]
        if len(found) > MOST_OF_A_KIND:
            self.problems.append(f"{len(found) - MOST_OF_A_KIND} more like: {found[-1]}")

    def reader(self, info: FileInfo) -> Callable[[int, int], bytes]:
        def read(start: int, stop: int) -> bytes:
            content = bytearray(stop - start)
            self.store.read_into(info, start, memoryview(content))
            return bytes(content)

        return read

    def read_small(self, path: str) -> bytes | None:
        info = self.files[path]
        try:
            data = self.reader(info)(0, info.size)
        except DistmergeError as error:
            self.problems.append(_sentence(error))
            return None
        self.read.add(path)
        return data

    def read_json(self, path: str) -> dict[str, Any] | None:
        if (data := self.read_small(path)) is None:
            return None
        try:
            parsed = json.loads(data)
        except (ValueError, RecursionError) as error:
            self.problems.append(f"{path} is not JSON: {error}.")
            return None
        if not isinstance(parsed, dict):
            self.problems.append(f"{path} is not a JSON object.")
            return None
        return parsed


def _sentence(error: DistmergeError) -> str:
    facts = "; ".join(error.facts)
    return f"{error.headline.rstrip('.')}: {facts}." if facts else error.headline
