"""Answers about the whole model, kept beside the receipts: losing the driver doesn't repeat the
rounds that found them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from distmerge.checkpoints.store import OutputStore
from distmerge.expressions.asked import Answered
from distmerge.expressions.evaluate import Place
from distmerge.expressions.model_questions import ModelQuestions
from distmerge.methods.cutoff import Cut
from distmerge.plan.plan import Plan
from distmerge.run.engine import Engine
from distmerge.write.shard import STAGING


def ask_model(decided: Plan, engine: Engine, output: OutputStore) -> dict[Place, Any]:
    """Answers to questions about the whole model, from as many passes over all units as they
    take, or from the journal of an earlier run."""
    journalled = load_answers(output, decided.digest)
    if journalled:
        return journalled
    questions = ModelQuestions()
    while True:
        shares = engine.ask(decided.units, questions.known)
        if not questions.fold(key for unit in shares for key in unit):
            break
    save_answers(output, decided.digest, questions.known)
    return questions.known


def journal_path(digest: str) -> str:
    """Where the answers lie in the output."""
    return f"{STAGING}/{digest}/answers.json"


def save_answers(output: OutputStore, digest: str, known: Mapping[Place, Any]) -> None:
    """Keep answers of the built-in questions; those of a user's own kind are asked again."""
    entries = []
    for place, state in known.items():
        told = _encode(state.answer) if isinstance(state, Answered) else None
        if told is None:
            return
        entries.append({"place": place, "answer": told})
    output.write_bytes(journal_path(digest), json.dumps(entries).encode())


def load_answers(output: OutputStore, digest: str) -> dict[Place, Any]:
    """The answers that an earlier run of this digest found; {} without them."""
    try:
        entries = json.loads(output.read_bytes(journal_path(digest)))
        found = {}
        for entry in entries:
            node, ordinal, number = entry["place"]
            found[node, ordinal, number] = Answered(_decode(entry["answer"]))
        return found
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def _encode(answer: Any) -> Any:
    """Floats by their exact hexadecimal spelling."""
    if isinstance(answer, float):
        return {"number": answer.hex()}
    if isinstance(answer, Cut):
        return {"cut": [answer.value.hex(), answer.share.hex()], "single": answer.single}
    if isinstance(answer, np.ndarray):
        return {"array": [float(x).hex() for x in answer.ravel()], "shape": answer.shape}
    return None


def _decode(told: Mapping[str, Any]) -> Any:
    if "number" in told:
        return float.fromhex(told["number"])
    if "cut" in told:
        value, share = map(float.fromhex, told["cut"])
        return Cut(value, share, single=bool(told["single"]))
    return np.array([float.fromhex(x) for x in told["array"]]).reshape(told["shape"])
