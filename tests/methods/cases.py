"""One or more cases for every built-in method: what the contract is tried with."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from methods.trees import apply, merged


@dataclass(frozen=True)
class Case:
    """A method, how many models it is given, and its parameters."""

    method: str
    count: int
    base: bool = True
    fishers: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)
    random: bool = False
    """Does the seed matter?"""
    sums: bool = False
    """Does it ask for sums of floats, whose last bits depend on the order of addition?"""
    lines: str | None = None
    """Does every row, or column, have statistics of its own?"""

    def __str__(self):
        shown = {k: v for k, v in self.parameters.items() if k not in ("weight", "t")}
        return "-".join([self.method, *(f"{k}={v}" for k, v in shown.items())])

    @property
    def cuts(self):
        """Does a threshold decide what becomes of an element?"""
        return "density" in self.parameters or self.method in ("arcee_fusion", "sce")

    def with_parameters(self, **changed):
        return replace(self, parameters={**self.parameters, **changed})

    def per_model(self, name, value):
        return self.with_parameters(**{name: [value] * self.count})

    def tensors(self, shape, *, dtype=torch.float32, seed=0):
        """Base, models and importances: {"base": tensor or None, "models": [...], ...}."""
        generator = torch.Generator().manual_seed(seed)
        wide = torch.promote_types(dtype, torch.float32)

        def normal():
            return torch.randn(shape, generator=generator, dtype=wide)

        base = normal()
        models = [(base + 0.1 * normal()).to(dtype) for _ in range(self.count)]
        return {
            "base": base.to(dtype) if self.base else None,
            "models": models,
            "fishers": [normal().square().to(dtype) for _ in models] if self.fishers else None,
        }

    def node(self, models, base=None, fishers=None):
        return apply(self.method, models, base, fishers=fishers, parameters=self.parameters)

    def merge(self, models, base=None, fishers=None, *, seed=0):
        return merged(self.node(models, base, fishers), seed=seed)


CHANCES = {"density": [0.5, 0.7, 0.9], "epsilon": [0.3, 0.1, 0.05]}
GAMMA = {"gamma": [0.01, 0.01, 0.1]}
FIVE = [0.3, 0.25, -0.2, 0.4, 0.15]
ROWS = {"nuslerp_flatten": False}
COLUMNS = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
CASES = [
    Case("linear", 5, base=False, parameters={"weight": FIVE}),
    Case("linear", 3, base=False, parameters={"weight": [1.0, 0.5, 2.0], "normalize": False}),
    Case("slerp", 1, parameters={"t": 0.3}, sums=True),
    Case("slerp", 2, base=False, parameters={"t": 0.6}, sums=True),
    Case("model_stock", 5, sums=True),
    Case("model_stock", 3, parameters={"over": "model"}, sums=True),
    Case("task_arithmetic", 5, parameters={"weight": FIVE, "lambda": 0.8}),
    Case("task_arithmetic", 3, parameters={"weight": [0.4, 0.3, 0.5], "normalize": True}),
    Case("ties", 5, parameters={"weight": FIVE, "density": [0.2, 0.5, 1.0, 0.05, 0.4]}),
    Case(
        "ties",
        3,
        parameters={"weight": [1.0, 0.5, 0.7], "density": [0.3] * 3, "over": "model"},
    ),
    Case(
        "dare_linear",
        3,
        parameters={"weight": [1.0, 0.5, 0.7], "density": [0.3, 0.5, 1.0]},
        random=True,
        sums=True,
    ),
    Case(
        "dare_ties",
        5,
        parameters={"weight": FIVE, "density": [0.5] * 5, "rescale": "density"},
        random=True,
    ),
    Case(
        "ties",
        3,
        parameters={
            "weight": [1.0, -0.5, 0.7],
            "density": [0.3] * 3,
            "sign_weighting": "paper",
            "rescale": True,
        },
        sums=True,
    ),
    Case(
        "breadcrumbs",
        3,
        parameters={"weight": [1.0, -0.5, 0.7], "density": [0.9, 0.5, 0.2], **GAMMA},
    ),
    Case(
        "breadcrumbs_ties",
        5,
        parameters={"weight": FIVE, "density": [0.6] * 5, "gamma": [0.1, 0.0, 0.01, 0.3, 0.5]},
    ),
    Case(
        "breadcrumbs_ties",
        3,
        parameters={"weight": [0.3] * 3, "density": [0.6] * 3, **GAMMA, "over": "model"},
    ),
    Case("della", 3, parameters={"weight": [1.0, 0.5, 0.7], **CHANCES}, random=True, sums=True),
    Case(
        "della_linear",
        3,
        parameters={"weight": [1.0, 0.5, 0.7], **CHANCES, "rescale": False},
        random=True,
        lines="rows",
    ),
    Case("sce", 3, sums=True),
    Case("sce", 5, parameters={"select_topk": 0.3}, sums=True),
    Case("median", 5, base=False),
    Case("median", 4, base=False),
    Case("max_magnitude", 5),
    Case("fisher", 3, base=False, fishers=True),
    Case("passthrough", 1, base=False, parameters={"scale": [None]}),
    Case("nuslerp", 2, parameters={"weight": [0.3, 0.9]}, sums=True),
    Case("nuslerp", 2, base=False, parameters={"weight": [0.5, 0.5]}, sums=True),
    Case("nuslerp", 2, parameters={"weight": [0.3, 0.9], **ROWS}, sums=True, lines="rows"),
    Case("nuslerp", 2, parameters={"weight": [0.3, 0.9], **COLUMNS}, sums=True, lines="columns"),
    Case("multislerp", 3, parameters={"weight": [1.0, 0.5, 0.7]}, sums=True),
    Case("multislerp", 5, base=False, parameters={"weight": FIVE}, sums=True),
    Case("karcher", 3, base=False, sums=True),
    Case("model_stock", 3, parameters={"filter_wise": True}, sums=True, lines="rows"),
    Case("nearswap", 1, parameters={"t": 0.05}),
    Case("arcee_fusion", 1, lines="rows"),
    Case("ram", 5, parameters={"epsilon": 0.1}),
    Case("ramplus_tl", 3, parameters={"epsilon": 0.1, "r": 0.5, "alpha": 2.0}, sums=True),
    Case("ramplus_tl", 2, parameters={"epsilon": 0.1, "over": "model"}, sums=True),
]
