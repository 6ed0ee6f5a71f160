"""`qc.transform` in standard operators, against its oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.ir import dialect

SIZE = 40


class Transform(nn.Module):
    """One transform of the last axis, with parameters of its own."""

    def __init__(self, kind: str, dims: list[int], params: list[Tensor]) -> None:
        super().__init__()
        self.kind, self.dims = kind, dims
        for i, param in enumerate(params):
            self.register_buffer(f"p{i}", param)
        self.count = len(params)

    def forward(self, x: Tensor) -> Tensor:
        params = [getattr(self, f"p{i}") for i in range(self.count)]
        return dialect.transform(x, params, self.kind, self.dims)


def signs(size: int) -> Tensor:
    return torch.randint(0, 2, (size,), dtype=torch.int8) * 2 - 1


torch.manual_seed(0)
CASES: dict[str, tuple[str, list[int], list[Tensor]]] = {
    "diagonal": ("diagonal", [], [torch.randn(SIZE)]),
    "shift": ("shift", [], [torch.randn(SIZE)]),
    "permutation": ("permutation", [], [torch.randperm(SIZE)]),
    "hadamard": ("hadamard", [40, 0, 0], []),
    "hadamard of blocks": ("hadamard", [8, 0, 1], [signs(SIZE)]),
    "inverse hadamard": ("hadamard", [20, 1, 1], [signs(SIZE)]),
    "one matrix": ("matrix", [], [torch.randn(SIZE, SIZE)]),
    "the same matrix for all blocks": ("matrix", [], [torch.randn(8, 8)]),
    "a matrix for each block": ("matrix", [], [torch.randn(5, 8, 8)]),
    "several": (
        "compose+diagonal+hadamard+permutation+identity",
        [4, 4, 0, 0],
        [torch.randn(SIZE), torch.randperm(SIZE)],
    ),
    "several side by side": (
        "block_diagonal+hadamard+shift",
        [2, 24, 16, 24, 1, 0],
        [torch.randn(16)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_transform_equals_its_oracle(onnx: Any, name: str) -> None:
    onnx.check(Transform(*CASES[name]), lambda n: (torch.randn(2, n, SIZE),), rtol=1e-4, atol=1e-5)


def test_large_hadamard_is_made_of_small_matrices(onnx: Any) -> None:
    module = Transform("hadamard", [512, 0, 0], [])
    graph = onnx.emit(onnx.capture(module, torch.randn(3, 512)))
    sizes = [v.shape for v in graph.model.graph.initializers.values() if len(v.shape) == 2]
    assert sorted(tuple(shape) for shape in sizes) == [(8, 8), (64, 64)]
    onnx.check(module, lambda n: (torch.randn(n, 512),), rtol=1e-4, atol=1e-5)
