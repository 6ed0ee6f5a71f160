"""What the Triton kernel becomes on GPUs that need not be here."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is missing: pip install 'qcompile[cuda]'")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qcompile.kernels.triton.quantized_linear import (  # noqa: E402
    choose_launch,
    constants,
    quantized_linear_kernel,
)

N = K = 1024
_TRITON_DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}
_TENSOR_CORES = re.compile(
    r"\b(?:mma\.sync\.aligned|wgmma\.mma_async\.sync\.aligned|tcgen05\.mma)\.\S+"
)
_ASSEMBLER_NAMES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
_OWN_INSTRUCTION = {80: "mma", 90: "wgmma", 100: "tcgen05"}
"""What each generation multiplies large tiles with; all have ``mma`` for small ones."""


@dataclass(frozen=True)
class Build:
    """A kernel to compile: for a GPU, a weight format, and types of activations and products."""

    capability: int
    m: int
    bits: int
    group_size: int
    operand: torch.dtype
    x: torch.dtype
    zeros: bool = False

    def __str__(self) -> str:
        names = _TRITON_DTYPES
        zeros = "-zeros" if self.zeros else ""
        return (
            f"sm{self.capability}-m{self.m}-int{self.bits}g{self.group_size}{zeros}"
            f"-{names[self.x]}-{names[self.operand]}"
        )


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

BUILDS = [
    Build(capability, *build)
    for capability in (80, 90)
    for build in [
        (1, 4, 64, F16, F16),
        (64, 8, 0, BF16, BF16),
        (512, 4, 32, BF16, BF16, True),
        (512, 4, 128, F16, F32),
    ]
]
"""Each group size, width and type at least once: for one row, some and many, on both GPUs."""

SLOW_BUILDS = [
    Build(capability, m, *build)
    for capability, m in [(80, 1), (80, 512), (90, 1), (90, 512), (100, 512)]
    for build in [
        *((4, group, F16, F32, True) for group in (32, 64, 128)),
        *((4, group, BF16, BF16) for group in (64, 128)),
        (4, 48, F16, F32, True),
        (2, 64, F16, F16),
        (8, 128, F16, F32, True),
        (4, 64, F32, F32),
    ]
]


@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_compiled_kernel_uses_tensor_cores_and_spills_nothing(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_build(build, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("build", SLOW_BUILDS, ids=str)
def test_other_compiled_kernels_use_tensor_cores_and_spills_nothing(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_build(build, tmp_path, monkeypatch)


def _check_build(build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    # Both choices of Triton are fine here; unset, it warns.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    ptx = _compile(build)
    instructions = set(_TENSOR_CORES.findall(ptx))
    assert instructions
    # Float32 is multiplied in small tiles.
    large = build.m >= 64 and build.operand != F32
    own = _OWN_INSTRUCTION[build.capability] if large else "mma"
    assert all(i.startswith(own) for i in instructions)
    kind = {F16: ".f32.f16.f16", BF16: ".f32.bf16.bf16", F32: ".f32.tf32.tf32"}[build.operand]
    # Blackwell's names both half precisions alike.
    assert all(i.endswith("kind::f16") if own == "tcgen05" else kind in i for i in instructions)
    assert _spilled_bytes(ptx, build.capability, folder) == 0


def _compile(build: Build) -> str:
    """The kernel's PTX."""
    launch = choose_launch(build.m, N, K, build.bits, build.operand)
    fixed = constants(
        K, build.bits, build.group_size, build.operand, launch, saturate=build.x != build.operand
    )
    result = build.x if launch.splits == 1 else F32
    kinds = {
        "x": f"*{_TRITON_DTYPES[build.x]}",
        "packed": "*u8",
        "scale": "*fp16",
        "zero_point": "*u8" if build.zeros else "constexpr",
        "bias": "*fp32" if launch.splits == 1 else "constexpr",
        "out": f"*{_TRITON_DTYPES[result]}",
        **dict.fromkeys(("m", "n", "k", "blocks"), "i32"),
        **dict.fromkeys(fixed, "constexpr"),
    }
    absent = {n: None for n in ("zero_point", "bias") if kinds[n] == "constexpr"}
    # What the launcher finds out about real arguments: pointers and widths are multiples of 16.
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(quantized_linear_kernel.arg_names)
        if kinds[name].startswith("*") or name in ("n", "k")
    }
    source = ASTSource(quantized_linear_kernel, kinds, {**fixed, **absent}, aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", build.capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    ptx: str = compiled.asm["ptx"]
    return ptx


def _spilled_bytes(ptx: str, capability: int, folder: Path) -> int:
    """What the assembler moves to memory for want of registers."""
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    name = _ASSEMBLER_NAMES[capability]
    try:
        assembler = get_ptxas(capability).path
    except RuntimeError as error:
        pytest.skip(f"triton comes without ptxas: {error}")
    done = subprocess.run(
        [assembler, "-v", f"--gpu-name={name}", str(path), "-o", str(folder / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert found, done.stderr
    return sum(map(int, found))
