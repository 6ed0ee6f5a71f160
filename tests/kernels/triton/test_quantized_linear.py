"""The Triton kernel, run by Triton's interpreter, against its oracle.

Triton decides when a kernel is defined whether it is interpreted: that happens in a process of its
own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.kernels.quantize.groups import group_count
from qcompile.kernels.quantized_linear.layout import pack_codes
from qcompile.kernels.quantized_linear.reference import quantized_linear as oracle

pytest.importorskip("triton", reason="triton is not installed: pip install 'qcompile[cuda]'")
from qcompile.kernels.triton.quantized_linear import choose_launch, quantized_linear

_FLAGS = ("zeros", "float_zeros", "bias", "exact")


@dataclass(frozen=True)
class Case:
    """A product of the kernel; the numbers follow from it."""

    m: int
    n: int
    k: int
    bits: int = 4
    group_size: int = 32
    zeros: bool = False
    float_zeros: bool = False
    bias: bool = False
    x: str = "float32"
    scale: str = "float16"
    rounding: str = "none"
    exact: bool = False

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in _FLAGS if getattr(self, name))
        size = f"{self.m}x{self.n}x{self.k}-int{self.bits}g{self.group_size}"
        return f"{size}{flags}-{self.x}-{self.scale}-{self.rounding}"

    def arguments(self) -> tuple[Tensor | int | str | None, ...]:
        """Those of `quantized_linear`.

        An `exact` case has small whole numbers, which no type rounds: its products and sums are
        right to the last bit in any order.
        """
        generator = torch.Generator().manual_seed(self.m * 1000 + self.n + self.k)
        groups = group_count(self.k, self.group_size)

        def codes(rows: int, columns: int) -> Tensor:
            shape = (rows, columns)
            return torch.randint(2**self.bits, shape, dtype=torch.uint8, generator=generator)

        def reals(*shape: int) -> Tensor:
            if self.exact:
                return torch.randint(-4, 5, shape, generator=generator).float()
            return torch.randn(shape, generator=generator)

        zero_point = codes(groups, self.n) if self.zeros else None
        if self.float_zeros:
            zero_point = codes(groups, self.n) + reals(groups, self.n).half()
        scale = 2.0 ** reals(groups, self.n) if self.exact else reals(groups, self.n) / 8
        return (
            reals(self.m, self.k).to(getattr(torch, self.x)),
            pack_codes(codes(self.n, self.k), self.bits),
            scale.to(getattr(torch, self.scale)),
            zero_point,
            reals(self.n) if self.bias else None,
            *(self.k, self.bits, self.group_size, self.rounding),
        )


ODD_SHAPES = [
    Case(1, 1, 1),
    Case(1, 33, 31),
    Case(2, 5, 65, zeros=True, bias=True),
    Case(15, 31, 97, group_size=64, zeros=True),
    Case(15, 31, 97, group_size=48, float_zeros=True),
    Case(16, 32, 64, group_size=0, bias=True),
    Case(17, 40, 70, group_size=128, zeros=True),
    Case(3, 33, 100, group_size=48, zeros=True, bias=True),
    Case(2, 9, 70, group_size=7),
    Case(70, 5, 34, bias=True),
]
WIDTHS = [
    Case(3, 20, 150, bits=bits, group_size=group, zeros=zeros)
    for bits, group, zeros in [
        (1, 64, True),
        (2, 32, False),
        (3, 0, True),
        (5, 64, False),
        (6, 32, True),
        (8, 0, False),
        (8, 128, True),
    ]
]
DTYPES = [
    Case(4, 20, 70, scale="bfloat16", exact=True, bias=True),
    Case(4, 20, 70, scale="float32", zeros=True),
    Case(4, 20, 70, x="float16"),
    Case(70, 20, 40, x="float16", zeros=True),
    Case(4, 20, 70, rounding="float16", zeros=True),
    # Triton's interpreter cuts float32 off where bfloat16 is rounded to: exact numbers only.
    Case(4, 20, 70, rounding="bfloat16", exact=True),
    Case(70, 20, 70, rounding="bfloat16", zeros=True, exact=True),
    Case(3, 4, 33, x="bfloat16", bits=2, group_size=0, exact=True),
]
SPLIT = [Case(1, 8, 2100, group_size=64, zeros=True, bias=True), Case(2, 40, 1056, bits=8)]

CASES = [*ODD_SHAPES, *WIDTHS, *DTYPES, *SPLIT]


_PROGRAM = """
import sys, torch
from qcompile.kernels.triton.quantized_linear import INTERPRETED, quantized_linear
assert INTERPRETED
cases = torch.load(sys.argv[1], weights_only=True)
torch.save([quantized_linear(*arguments) for arguments in cases], sys.argv[2])
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Tensor]:
    """What Triton's interpreter makes of all cases, in one process."""
    folder: Path = tmp_path_factory.mktemp("interpreted")
    torch.save([case.arguments() for case in CASES], folder / "cases.pt")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(folder / "cases.pt"), str(folder / "out.pt")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, torch.load(folder / "out.pt", weights_only=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_computes_what_the_oracle_does(interpreted: dict[Case, Tensor], case: Case) -> None:
    arguments: Any = case.arguments()
    expected, found = oracle(*arguments), interpreted[case]
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if case.exact and case.x == "float32":
        assert torch.equal(found, expected)
        return
    error, scale = (found.float() - expected.float()).abs().max(), expected.float().abs().max()
    # Sums in another order; results rounded to the type of x, to a neighbour at worst.
    assert error <= {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}[case.x] * scale


def test_sums_are_split_where_rows_are_few_and_the_weight_is_small() -> None:
    for case in SPLIT:
        launch = choose_launch(case.m, case.n, case.k, case.bits, torch.float32)
        assert launch.splits > 1
    assert choose_launch(1, 128_000, 4096, 4, torch.float16).splits == 1
    assert choose_launch(512, 64, 4096, 4, torch.float16).splits == 1


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_no_rows_are_no_work(shape: tuple[int, ...]) -> None:
    case = Case(1, 8, 40, bias=True)
    _, *rest = case.arguments()
    arguments: Any = (torch.empty(shape), *rest)
    assert quantized_linear(*arguments).shape == (*shape[:-1], 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_on_a_gpu_computes_what_the_oracle_does(case: Case) -> None:
    arguments: Any = case.arguments()
    placed = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
    expected, found = oracle(*arguments).float(), quantized_linear(*placed).cpu().float()
    error, scale = (found - expected).abs().max(), expected.abs().max()
    assert error <= {"float32": 5e-6, "float16": 1e-3, "bfloat16": 8e-3}[case.x] * scale
