"""What a merge says of itself while it runs; progress bars, logs and `--json` listen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from distmerge.credentials import redact

if TYPE_CHECKING:
    from distmerge.plan.plan import Plan
    from distmerge.plan.work import WorkUnit
    from distmerge.write.shard import Receipt

Kind = Literal[
    "plan",
    "notice",
    "worker",
    "progress",
    "unit",
    "retry",
    "stall",
    "score",
    "publish",
    "failed",
    "done",
]
"""plan: units, bytes_in, bytes_out, tensors, resumed (units that an earlier run finished)
notice: text
worker: node, pid of a worker on a cluster that is ready
progress: bytes_read, bytes_written since the last event of this kind; on a cluster also shard,
    and node and pid of its worker
unit: shard, bytes_read, bytes_written of all of it, done (units so far), total; on a cluster node
retry: shard, attempt, node (where the worker was lost), reason
stall: shard, node, pid of a worker that has moved no byte for so many seconds
score: candidate, scores (name -> number), error (None, or why there are none), seconds,
    done (candidates so far)
publish: shards, bytes_read, bytes_written of all of them; they are there, now to be published
failed: error (its class), text (its first sentence, if it is one of ours)
done: url, seconds, bytes_read, bytes_written, tensors, lost_delta_share, notices"""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. `data` holds numbers and sentences, never tensors or secrets."""

    kind: Kind
    data: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    def json(self) -> str:
        """One line of JSON, credentials taken out."""
        data = _without_secrets(self.data)
        return json.dumps({"event": self.kind, "time": round(self.time, 3), **data})


def _without_secrets(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: _without_secrets(inner) for key, inner in value.items()}
    return [_without_secrets(inner) for inner in value] if isinstance(value, list) else value


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listens to nothing."""


def tell_plan(decided: Plan, todo: Sequence[WorkUnit], listener: Listener) -> None:
    """Tell the request's warnings, and what is still to do."""
    tell_notices(decided.request.warnings, listener)
    listener(
        Event(
            "plan",
            {
                "units": len(decided.units),
                "resumed": len(decided.units) - len(todo),
                "bytes_in": sum(unit.bytes_in for unit in todo),
                "bytes_out": sum(unit.size - len(unit.header) for unit in todo),
                "tensors": len(decided.weight_map),
                "expression": decided.expression,
                "projected_mem": decided.memory.projected,
            },
        )
    )


def tell_notices(sentences: Iterable[str], listener: Listener) -> None:
    """Tell sentences, one by one."""
    for text in sentences:
        listener(Event("notice", {"text": text}))


def tell_publishing(receipts: Sequence[Receipt], listener: Listener) -> None:
    """Tell that every shard is there."""
    moved = {
        "bytes_read": sum(receipt.bytes_read for receipt in receipts),
        "bytes_written": sum(receipt.size for receipt in receipts),
    }
    listener(Event("publish", {"shards": len(receipts), **moved}))


def told_bytes(listener: Listener) -> Callable[[int, int], None]:
    """Tells the listener of bytes read and written."""

    def tell(read: int, written: int) -> None:
        listener(Event("progress", {"bytes_read": read, "bytes_written": written}))

    return tell
