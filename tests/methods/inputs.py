"""Random models for comparisons with formulas, and the bound that they are compared within.

The bound: an element may be off by ROUNDING units in the last place of the largest term that goes
into it, for the float32 arithmetic of the methods; the same in float64's units for float64 inputs.
"""

import numpy as np
import torch
from methods.formulas import float64

ROUNDING = 16
SHAPE = (150, 63)
DTYPES = [torch.float32, torch.float64]


def random(*shape, seed, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)


class Models:
    """A base and fine-tunes, as tensors and as float64 arrays."""

    def __init__(self, dtype, count=3, shape=SHAPE, seed=1, scale=0.1):
        self.base = random(*shape, seed=seed, dtype=dtype)
        steps = [random(*shape, seed=seed + 1 + i, dtype=dtype, scale=scale) for i in range(count)]
        self.models = [self.base + step for step in steps]
        self.base64 = float64(self.base)
        self.models64 = [float64(m) for m in self.models]


def assert_close(found, expected, *terms):
    """`terms`: what was added up, whose largest magnitude is the scale of rounding errors."""
    assert tuple(found.shape) == expected.shape
    scale = max(float(np.abs(t).max()) for t in (*terms, expected))
    bound = ROUNDING * torch.finfo(found.dtype).eps * scale
    error = float(np.abs(float64(found) - expected).max())
    assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"


def share_off_by_more_than_a_unit(found, expected):
    """Of a result's elements, those further from a float64 reference than their last place."""
    rounded = torch.from_numpy(expected).to(found.dtype)
    kind = torch.finfo(found.dtype)
    magnitude = rounded.double().abs().clamp(min=kind.smallest_normal)
    unit = kind.eps * 2.0 ** torch.floor(torch.log2(magnitude))
    return float(((found.double() - rounded.double()).abs() > unit).double().mean())
