"""What an output needs besides its shards: the donor's files, config, card, manifest, index."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from typing import Any

from distmerge.checkpoints.location import HUB_SCHEME
from distmerge.checkpoints.opening import open_store
from distmerge.checkpoints.scales import BLOCK
from distmerge.checkpoints.spellings import OUTPUT, ties
from distmerge.checkpoints.store import OutputStore, StorageOptions, Store
from distmerge.checkpoints.tensors import Checkpoint
from distmerge.credentials import redact
from distmerge.expressions.nodes import Apply, Leaf, leaves, walk
from distmerge.expressions.origins import layer_origins
from distmerge.plan.eight_bit import CODES
from distmerge.plan.plan import Plan
from distmerge.write.card import license_warnings, model_card, parent_of
from distmerge.write.config import edit_config, eight_bit_section, written_dtype
from distmerge.write.config_layers import Origin, edit_layers
from distmerge.write.donor_files import copy_donor_files, files_to_copy
from distmerge.write.index import INDEX_FILE, SINGLE_FILE, index_json
from distmerge.write.manifest import (
    EVENTS_FILE,
    MANIFEST_FILE,
    InputRecord,
    Manifest,
    ShardRecord,
    SkippedTensor,
    checksum,
)
from distmerge.write.publish import publish
from distmerge.write.shard import Receipt

RECIPE_FILE = "mergekit_config.yml"
"""Where whoever reads merges looks for the recipe."""


def finish(
    plan: Plan, output: OutputStore, receipts: Sequence[Receipt], events: Callable[[], bytes]
) -> dict[str, Any]:
    """Write everything else and publish. Returns what the `done` event tells.

    events: the log of the run, asked for when all else is there.
    """
    files, checksums = other_files(plan, output)
    card, warnings = _card(plan, output)
    files["README.md"] = card.encode()
    if plan.request.recipe_text is not None:
        files[RECIPE_FILE] = redact(plan.request.recipe_text).encode()
    lost = _lost_share(receipts)
    several = len(plan.units) > 1
    index = index_json(plan.weight_map, plan.nbytes, {"format": "pt"}) if several else None
    small = {**files, **({INDEX_FILE: index} if index is not None else {})}
    checksums |= {path: checksum(data) for path, data in small.items()}
    manifest = _manifest(plan, receipts, checksums, lost)
    url = publish(
        output,
        files=files | {EVENTS_FILE: events()},
        manifest=manifest,
        index=index,
        staged=None if several else plan.units[0].path,
        text=plan.expression,
    )
    return {
        **({"url": url} if url else {}),
        "bytes_read": sum(receipt.bytes_read for receipt in receipts),
        "bytes_written": sum(receipt.size for receipt in receipts),
        "tensors": len(plan.weight_map),
        "lost_delta_share": lost,
        "peak_memory": max((receipt.peak_memory for receipt in receipts), default=0),
        "notices": warnings,
    }


def names_of_files(plan: Plan) -> set[str]:
    """Paths of all files that the output will have, or may have."""
    found = {"README.md", "config.json", RECIPE_FILE, EVENTS_FILE, MANIFEST_FILE, INDEX_FILE}
    found |= {SINGLE_FILE, *plan.weight_map.values()}
    if (donor := plan.request.files_from) is not None:
        found |= {info.path for info in files_to_copy(donor.checkpoint.files)}
    if plan.request.tokenizer is not None:
        found |= plan.request.tokenizer.files.keys()
    return found


def other_files(plan: Plan, output: OutputStore) -> tuple[dict[str, bytes], dict[str, str]]:
    """What loaders need beside the tensors: the donor's files, copied, with their checksums; the
    config and what replaces some of the donor's files, to be written."""
    donor = plan.request.files_from
    options = plan.request.storage_options
    checksums: dict[str, str] = {}
    files: dict[str, bytes] = {}
    if donor is not None:
        with closing(_store(donor.checkpoint, options)) as store:
            tokenizer = plan.request.tokenizer
            replaced = tokenizer.replaced if tokenizer else frozenset()
            checksums = copy_donor_files(donor.checkpoint, store, output, replaced)
        if donor.checkpoint.config is not None:
            files["config.json"] = _config(plan, donor.checkpoint)
    if plan.request.tokenizer is not None:
        files |= plan.request.tokenizer.files
    return files, checksums


def _store(checkpoint: Checkpoint, options: StorageOptions) -> Store:
    place = checkpoint.spool
    return open_store(checkpoint.root, options, revision=checkpoint.revision, spool=place)


def _config(plan: Plan, donor: Checkpoint) -> bytes:
    assert donor.config is not None
    # A head of its own beside a flag that says it is tied would be lost by some loaders.
    head = any(
        key.split(".")[-2:] == ["lm_head", "weight"]
        or (OUTPUT.search(key) and key not in donor.presented)
        for key in plan.weight_map
    )
    untied = head and ties(donor.config)
    edited = edit_config(
        _config_of_layers(plan, donor.config),
        dtypes=plan.dtypes,
        nbytes=plan.sizes,
        tied=False if untied else None,
        quantization=_quantization(plan, donor.config),
    )
    return (json.dumps(edited, indent=2, ensure_ascii=False) + "\n").encode()


def _quantization(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config's section on 8-bit weights, if there are any."""
    if CODES not in plan.dtypes.values():
        return None
    matrices = [
        task.program.key.removesuffix(".weight")
        for unit in plan.units
        for task in unit.tasks
        if len(task.shape) > 1 and task.dtype != CODES and task.program.key.endswith(".weight")
    ]
    return eight_bit_section(config, BLOCK, matrices)


def _config_of_layers(plan: Plan, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The donor's config, for layers that may have been put together anew."""
    for family, origins in layer_origins(plan.request.root, plan.weight_map).items():
        found = [Origin(leaf.checkpoint.config if leaf else None, n) for leaf, n in origins]
        config = edit_layers(config, family, found)
    return config


def _card(plan: Plan, output: OutputStore) -> tuple[str, list[str]]:
    parents, donor, base = [], plan.request.donor, None
    for leaf in leaves(plan.request.root):
        if isinstance(leaf, Leaf):
            checkpoint = leaf.checkpoint
            with closing(_store(checkpoint, plan.request.storage_options)) as store:
                parents.append(parent_of(checkpoint, store))
            if leaf == donor:
                base = parents[-1].name
            for adapter in checkpoint.others:
                with closing(_store(adapter, plan.request.storage_options)) as store:
                    parents.append(parent_of(adapter, store))
    card = model_card(
        name=_name(output.root),
        parents=parents,
        base=base,
        method=_method_name(plan),
        expression=plan.expression,
        recipe_text=plan.request.recipe_text,
        dtype=written_dtype(plan.dtypes, plan.sizes) or "as in the inputs",
        library_version=package_version(),
        library=_library(plan.request.config_from or donor),
    )
    return card, license_warnings(parents)


def _library(donor: Leaf | None) -> str | None:
    """transformers, if the config is one of its own; other checkpoints have none, or another's."""
    config = donor.checkpoint.config if donor is not None else None
    return "transformers" if config and config.keys() & {"model_type", "architectures"} else None


def _name(root: str) -> str:
    """The last part of a path or URL, without a Hub's branch."""
    if root.startswith(HUB_SCHEME):
        root = root.partition("@")[0]
    return root.rstrip("/").rsplit("/", 1)[-1]


def _method_name(plan: Plan) -> str:
    root = plan.request.root
    return root.method.name if isinstance(root, Apply) else "arithmetic"


def _manifest(
    plan: Plan, receipts: Sequence[Receipt], checksums: Mapping[str, str], lost: float | None
) -> Manifest:
    by_shard = {receipt.shard: receipt for receipt in receipts}
    root = plan.request.root
    return Manifest(
        distmerge_version=package_version(),
        expression=plan.expression,
        digest=plan.digest,
        recipe=plan.request.recipe_text,
        seed=plan.request.seed,
        inputs=[
            InputRecord.of(checkpoint)
            for leaf in leaves(root)
            if isinstance(leaf, Leaf)
            for checkpoint in (leaf.checkpoint, *leaf.checkpoint.others)
        ],
        kernel=plan.kernel,
        out_dtype=plan.request.out_dtype,
        shards=[
            ShardRecord(
                file=unit.shard,
                size=by_shard[unit.shard].size,
                checksum=by_shard[unit.shard].checksum,
                tensors=[task.program.key for task in unit.tasks],
            )
            for unit in plan.units
        ],
        files=dict(checksums),
        mappings=list(plan.inputs.mappings),
        skipped=[SkippedTensor(model=s.model, key=s.key, reason=s.reason) for s in plan.skipped],
        lost_delta_share=lost,
        methods={
            node.method.name: node.method.source_hash
            for node in walk(root)
            if isinstance(node, Apply)
        },
    )


def _lost_share(receipts: Sequence[Receipt]) -> float | None:
    changed = sum(receipt.changed for receipt in receipts)
    return sum(receipt.lost for receipt in receipts) / changed if changed else None


def package_version() -> str:
    """distmerge's own version."""
    return version("distmerge")
