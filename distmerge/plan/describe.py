"""A plan in tables for people and in JSON for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distmerge.credentials import redact
from distmerge.expressions.nodes import Leaf
from distmerge.plan.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from distmerge.plan.plan import Plan

SHOWN = 40
"""Rows of a long table; `--json` has them all."""


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything decided, as plain data."""
    memory = plan.memory
    return {
        "expression": plan.expression,
        "digest": plan.digest,
        "seed": plan.request.seed,
        "kernel": plan.kernel,
        "inputs": [_input(plan, i) for i in range(len(plan.inputs.leaves))],
        "tensors": len(plan.weight_map),
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.nbytes,
        "passes_before": plan.asks_model,
        "workers": plan.workers,
        "memory": {
            "allowed_mem": memory.allowed,
            "projected_mem": memory.projected,
            "reserved_mem": memory.reserved,
            "blocks": memory.blocks,
            "windows": memory.windows,
            "sending": memory.sending,
            "gathered": memory.gathered,
            "arena": memory.arena,
        },
        "units": [
            {"shard": u.shard, "tensors": len(u.tasks), "bytes_in": u.bytes_in, "size": u.size}
            for u in plan.units
        ],
        "mappings": list(plan.inputs.mappings),
        "skipped": [{"model": s.model, "key": s.key, "reason": s.reason} for s in plan.skipped],
        "warnings": list(plan.request.warnings),
        "weight_map": plan.weight_map,
    }


def _input(plan: Plan, i: int) -> dict[str, Any]:
    leaf, tensors = plan.inputs.leaves[i], plan.inputs.tensors[i]
    found: dict[str, Any] = {"name": str(leaf), "tensors": len(tensors)}
    if isinstance(leaf, Leaf):
        checkpoint = leaf.checkpoint
        found |= {
            "url": redact(checkpoint.url),
            "revision": checkpoint.revision,
            "fingerprint": checkpoint.fingerprint,
            "bytes": checkpoint.nbytes,
            "notices": list(checkpoint.notices),
        }
    return found


def tables(plan: Plan) -> list[Table]:
    """The plan as rich tables; names are shown as they are, never read as markup."""
    made = [_summary(plan), _inputs(plan), _units(plan)]
    if plan.inputs.mappings:
        made.append(
            listed(
                "Names matched", ("what was read as what",), [(m,) for m in plan.inputs.mappings]
            )
        )
    if plan.skipped:
        counts = Counter((s.model, s.reason) for s in plan.skipped)
        first = {(s.model, s.reason): s.key for s in reversed(plan.skipped)}
        rows = [(m, str(n), first[m, r], r) for (m, r), n in counts.items()]
        made.append(listed("Left out", ("model", "tensors", "such as", "because"), rows))
    return made


def _summary(plan: Plan) -> Table:
    memory = plan.memory
    rows = [
        ("expression", plan.expression),
        ("tensors", f"{len(plan.weight_map):,}"),
        ("read", format_size(plan.bytes_in)),
        ("written", format_size(plan.nbytes)),
        ("memory a worker", f"{format_size(memory.projected)} of {format_size(memory.allowed)}"),
        ("seed", str(plan.request.seed)),
        ("kernel", plan.kernel),
        ("digest", plan.digest),
    ]
    if plan.asks_model:
        rows.insert(4, ("passes", "the whole model is read for its statistics first"))
    rows += [("warning", text) for text in plan.request.warnings]
    return listed("Plan", ("what", "it is"), rows)


def _inputs(plan: Plan) -> Table:
    rows = []
    for i in range(len(plan.inputs.leaves)):
        found = _input(plan, i)
        place = found.get("url", "in memory") + (
            f" @{found['revision']}" if found.get("revision") else ""
        )
        rows.append(
            (found["name"], f"{found['tensors']:,}", format_size(found.get("bytes", 0)), place)
        )
    return listed("Inputs", ("model", "tensors", "size", "from"), rows)


def _units(plan: Plan) -> Table:
    rows = [
        (u.shard, f"{len(u.tasks):,}", format_size(u.bytes_in), format_size(u.size))
        for u in plan.units
    ]
    return listed("Work", ("shard", "tensors", "read", "written"), rows)


def listed(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of words, cut after `SHOWN` rows."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows[:SHOWN]:
        made.add_row(*map(Text, row))
    if len(rows) > SHOWN:
        made.add_row(Text(f"... and {len(rows) - SHOWN} more"))
    return made
