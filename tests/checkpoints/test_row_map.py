"""Rows of several matrices as one view, against indexing in plain torch."""

from __future__ import annotations

import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distmerge.checkpoints.row_map import Matrix, row_map
from distmerge.checkpoints.tensors import TensorInfo
from distmerge.checkpoints.views import View, as_view

WIDTH = 3
COUNTS = (5, 7, 4)
MATRICES = [torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in COUNTS]
PAIR = st.integers(0, 2).flatmap(lambda m: st.tuples(st.just(m), st.integers(0, COUNTS[m] - 1)))
ROWS = st.lists(st.lists(PAIR, max_size=3).map(tuple), min_size=1, max_size=12)


def matrices(*, views: bool) -> list[Matrix]:
    """In files of their own, at odd places; as tensors, or as views of them."""
    made = []
    for number, count in enumerate(COUNTS):
        info = TensorInfo("F32", (count, WIDTH), f"{number}", 100, 100 + count * WIDTH * 4)
        sources = (number,) if number else (0,)
        made.append(Matrix(as_view(info) if views else info, sources))
    return made


def read(view: View, span: tuple[int, int]) -> Tensor:
    """What a run of the view's elements is, each piece read where its part says."""
    pieces = []
    for number, (first, last) in view.needs(span):
        part = view.parts[number]
        assert part.source == int(part.info.file)
        start = (part.info.start - 100) // 4
        assert 0 <= first <= last <= part.info.elements
        pieces.append(MATRICES[part.source].reshape(-1)[start + first : start + last])
    return view.values(span, pieces)


@given(ROWS, st.integers(0, 3), st.booleans(), st.data())
def test_any_run_of_rows_is_as_indexing_has_it(rows, padding, views, data):
    view = pickle.loads(pickle.dumps(row_map(matrices(views=views), 0, rows, padding)))
    expected = torch.stack(
        [
            sum((MATRICES[m][r] for m, r in pairs), torch.zeros(WIDTH)) / max(len(pairs), 1)
            for pairs in rows
        ]
    )
    expected = torch.cat([expected, expected.mean(0, keepdim=True).expand(padding, -1)])
    assert view.shape == expected.shape
    first = data.draw(st.integers(0, view.elements - 1))
    last = data.draw(st.integers(first + 1, view.elements))
    torch.testing.assert_close(read(view, (first, last)), expected.reshape(-1)[first:last])
    whole = read(view, (0, view.elements))
    assert torch.equal(whole[first:last], read(view, (first, last)))


def test_rows_that_follow_one_another_are_one_part():
    rows = [((0, 1),), ((0, 2),), ((0, 3),), ((1, 0),), ((1, 1),)]
    view = row_map(matrices(views=False), 0, rows)
    assert [part.info.shape for part in view.parts] == [(3, WIDTH), (2, WIDTH)]
    assert sum(part.info.nbytes for part in view.parts) == 5 * WIDTH * 4
