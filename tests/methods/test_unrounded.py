"""What a loop rounds as it makes it, against torch's rounding of what it makes in float32."""

import math

import pytest
import torch

from distmerge.methods.consensus import Consensus
from distmerge.methods.difference import Difference
from distmerge.methods.operands import bits
from distmerge.methods.unrounded import Unrounded, allow_unrounded


@pytest.mark.parametrize("elect", [None, "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spoil", [None, math.inf, math.nan, 3.4e38])
def test_what_is_left_unrounded_is_rounded_as_torch_does(elect, dtype, spoil):
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(2500, generator=generator)).to(dtype)
    noise = [1e-4 * torch.randn(2500, generator=generator) for _ in range(2)]
    models = [(base.float() + n).to(dtype) for n in noise]
    if spoil is not None:
        models[0][7] = spoil
    consensus = Consensus([1.0, 0.3], elect)
    deltas = [Difference(model, base) for model in models]
    with allow_unrounded(True):
        left = consensus.merge(base, deltas)
    assert isinstance(left, Unrounded)
    exact = consensus.merge(base, deltas)
    assert torch.equal(left.computed().nan_to_num(nan=7), exact.nan_to_num(nan=7))
    expected, before = exact.bfloat16(), base.bfloat16()
    changed = exact != before.float()
    lost = changed & (expected == before)
    for compared in (False, True):
        out = torch.empty(2500, dtype=torch.bfloat16)
        told = left.round(bits(out), bits(before) if compared else None)
        assert torch.equal(out.nan_to_num(nan=7), expected.nan_to_num(nan=7))
        counts = (int(changed.sum()), int(lost.sum())) if compared else (0, 0)
        assert told == (bool(expected.isfinite().all()), *counts)
        assert told[0] == (spoil is None)


def test_only_who_takes_results_unrounded_is_given_them():
    base, model = torch.zeros(10), torch.ones(10)
    merged = [Consensus([1.0]).merge(base, [Difference(model, base)])]
    with allow_unrounded(True), allow_unrounded(False):
        merged.append(Consensus([1.0]).merge(base, [Difference(model, base)]))
    assert all(isinstance(one, torch.Tensor) for one in merged)
