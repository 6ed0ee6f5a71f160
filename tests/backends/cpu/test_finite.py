"""Float weights with entries that are no numbers are refused by name, meant infinities are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qcompile.backends.cpu.finite import refuse_non_finite
from qcompile.errors import ModelError
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.program import Program
from qcompile.passes.canonicalize import canonicalize


class Network(nn.Module):
    """A convolution, a linear, an embedding, and a mask of infinities that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.linear = nn.Linear(6, 6)
        self.table = nn.Embedding(5, 6)
        self.register_buffer("mask", torch.full((6, 6), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(self.conv(x)) + self.table(torch.arange(4))
        return torch.softmax(hidden.mT @ hidden + self.mask, dim=-1)


def program(spoil: Callable[[Network], object]) -> Program:
    torch.manual_seed(0)
    network = Network()
    with torch.no_grad():
        spoil(network)
    return canonicalize(capture_module(network, torch.randn(3, 4, 6)))


def test_mask_of_infinities_is_meant() -> None:
    refuse_non_finite(program(lambda network: None))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "linear.weight", "table.weight"])
def test_weight_of_a_layer_must_be_finite(name: str, value: float) -> None:
    def spoil(network: Network) -> None:
        network.get_parameter(name).view(-1)[1:3] = value

    with pytest.raises(ModelError, match=f"weight '{name}' has 2 entries"):
        refuse_non_finite(program(spoil))
