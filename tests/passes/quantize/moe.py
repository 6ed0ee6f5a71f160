"""A layer of routed experts to quantize."""

from dataclasses import replace

import torch
from torch import nn

from qcompile.frontends.torch_export import capture_module
from qcompile.ir import dialect  # noqa: F401 -- defines qc.experts
from qcompile.ir.program import Program
from qcompile.ir.types import Fact

WIDTH, INNER = 32, 24


class Experts(nn.Module):
    """A router and gated experts, two for each token, beside a linear that reads the same input.

    Args:
        count: Number of experts.
        favourite: An expert that the router almost never leaves out, or None.
        bias: Whether experts have biases.
    """

    def __init__(self, count: int = 4, favourite: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, count)
        self.shared = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Parameter(torch.randn(count, 2 * INNER, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(count, WIDTH, INNER) / INNER**0.5)
        self.up_bias = nn.Parameter(torch.randn(count, 2 * INNER)) if bias else None
        self.down_bias = nn.Parameter(torch.randn(count, WIDTH)) if bias else None
        with torch.no_grad():
            self.router.bias.zero_()
            if favourite is not None:
                self.router.bias[favourite] += 100

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, index = self.router(x).softmax(-1).topk(2)
        routed = torch.ops.qc.experts(
            x,
            index,
            weight,
            self.up,
            self.up_bias,
            self.down,
            self.down_bias,
            "silu",
            True,
            0.0,
            0.0,
        )
        return x + self.shared(x) + routed


def experts(**options) -> Program:
    """One such layer, x [s0, 32] -> [s0, 32], after canonicalization would be done."""
    torch.manual_seed(0)
    program = capture_module(Experts(**options), torch.randn(5, WIDTH))
    return replace(program, facts=frozenset({Fact.CANONICAL}))
