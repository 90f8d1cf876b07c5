"""A merge evaluated the slow and obvious way: what the evaluator has to equal bit for bit.

Every block is cut out as a tensor of its own and the method started once on each; generators are
kept alive, in step with one another, where the evaluator replays them. Questions are asked of one
block after the other, in full, and folded in order.
"""

from collections.abc import Generator

import torch

from distmerge.expressions.compute_pool import one_torch_thread
from distmerge.methods.random import Draw
from distmerge.methods.reductions import Again

FULL = 2**18


def blocks_of(shape):
    """Bounds of the blocks of a matrix whose rows are shorter than a block."""
    rows = FULL // shape[1]
    starts = range(0, shape[0], rows)
    return [(first * shape[1], min(first + rows, shape[0]) * shape[1]) for first in starts]


def merge_by_hand(method, parameters, keys, *, seed=0):
    """The flat results by key.

    keys: key -> {"models": [...], "base": tensor or None, "fishers": [...] or None}, matrices in
    the dtype of the arithmetic.
    """
    blocks = [
        (key, start, stop)
        for key, given in keys.items()
        for start, stop in blocks_of(given["models"][0].shape)
    ]
    with one_torch_thread(), torch.no_grad():
        started = [_start(method, parameters, keys[block[0]], block, seed) for block in blocks]
        results = _talk(started, blocks, seed) if isinstance(started[0], Generator) else started
    joined = {key: [] for key in keys}
    for (key, *_), result in zip(blocks, results, strict=True):
        joined[key].append(result.reshape(-1))
    return {key: torch.cat(parts) for key, parts in joined.items()}


def _start(method, parameters, given, block, seed):
    key, start, stop = block
    seen = method.sees(parameters, given["models"][0].shape)

    def cut(tensor):
        piece = tensor.reshape(-1)[start:stop].clone()
        return piece.view(-1, tensor.shape[-1]) if seen == "rows" else piece

    passed = {method.parameters[name].keyword: value for name, value in parameters.items()}
    if method.takes_base:
        passed["base"] = None if given["base"] is None else cut(given["base"])
    if "rng" in method.offered:
        passed["rng"] = Draw(seed, (0, key), start)
    inputs = {name: [cut(t) for t in given[name]] for name in method.inputs}
    return method.function(**inputs, **passed)


def _talk(talks, blocks, seed):
    told, ordinal = [None] * len(talks), 0
    while True:
        said, results = [], []
        for talk, answers in zip(talks, told, strict=True):
            try:
                said.append(talk.send(answers))
            except StopIteration as stop:
                results.append(stop.value)
        if results:
            return results
        told = [
            _bound(answers, isinstance(asked, list), seed, block, ordinal)
            for answers, asked, block in zip(_answer(said, blocks), said, blocks, strict=True)
        ]
        ordinal += 1


def _bound(answers, is_list, seed, block, ordinal):
    key, start, _ = block
    told = [
        a.at(Draw(seed, (0, key, ordinal, j), start)) if hasattr(a, "at") else a
        for j, a in enumerate(answers)
    ]
    return told if is_list else told[0]


def _answer(said, blocks):
    """For each block, the answers to what it asked."""
    keys = [key for key, *_ in blocks]
    lists = [item if isinstance(item, list) else [item] for item in said]
    answers = [[] for _ in lists]
    for questions in zip(*lists, strict=True):
        if questions[0].over == "model":
            found = dict.fromkeys(keys, _ask(questions, keys))
        else:
            pairs = list(zip(keys, questions, strict=True))
            found = {
                key: _ask([q for k, q in pairs if k == key], [k for k in keys if k == key])
                for key in dict.fromkeys(keys)
            }
        for key, mine in zip(keys, answers, strict=True):
            mine.append(found[key])
    return answers


def _ask(questions, keys):
    """One answer: partials folded over the blocks of each key, then over the keys."""
    state = None
    while True:
        by_key = {}
        for key, question in zip(keys, questions, strict=True):
            partial = question.partial(state)
            by_key[key] = question.merge(by_key[key], partial) if key in by_key else partial
        total, *others = by_key.values()
        for other in others:
            total = questions[0].merge(total, other)
        outcome = questions[0].finish(total, state)
        if not isinstance(outcome, Again):
            return outcome
        state = outcome.state
