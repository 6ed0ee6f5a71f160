"""The `cuda` target: the program itself, with Triton kernels for its quantized layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import sympy
from torch import Tensor, fx

from qcompile.backends.base import Capabilities, Finding, Packed, Target
from qcompile.backends.cuda.lower import lower_phase
from qcompile.errors import TargetError
from qcompile.formats.base import Format
from qcompile.formats.integer import IntegerFormat
from qcompile.ir.operators import operator_name
from qcompile.ir.program import Program
from qcompile.ir.serialize import predict_program_files, save_program
from qcompile.ir.sizes import expression, is_symbolic
from qcompile.ir.text import format_target
from qcompile.ir.types import Port, Role
from qcompile.kernels.quantized_linear import LAYOUT_VERSION
from qcompile.manifest import Signature, ValueInfo
from qcompile.passes.infra import Context, PassManager
from qcompile.progress import Progress

_ROLE_SIZES = {
    Role.INPUT_IDS: ("batch", "query"),
    Role.PAST_KEY: (None, None, "past"),
    Role.LOGIT_POSITIONS: ("logits",),
}
"""What the sizes of an input are called, where they are not known."""


class CudaTarget(Target):
    """NVIDIA GPUs of compute capability 8.0 and above.

    Args:
        rounding: What tensor cores multiply in quantized linear layers: ``"float16"`` or
            ``"bfloat16"``; ``"none"`` multiplies float32. Everything else is float32.

    Raises:
        TargetError: If `rounding` is something else.
    """

    name = "cuda"

    def __init__(self, rounding: str = "float16") -> None:
        self._phase = lower_phase(rounding)

    @property
    def capabilities(self) -> Capabilities:
        """Integer weights of every width; int8 activations; the operators of a saved program."""
        return Capabilities(
            weight_format=_format_reason,
            embedding_format=_format_reason,
            activation_formats=frozenset({"int8"}),
            barrier=_barrier_reason,
        )

    def check(self, program: Program) -> list[Finding]:
        """Calls that a saved program may not make."""
        reasons = ((node, _barrier_reason(node)) for node in program.calls())
        return [Finding(node.name, reason) for node, reason in reasons if reason is not None]

    def lower(self, program: Program, context: Context) -> Program:
        """One node per quantized layer; the others stay as they are."""
        return PassManager([self._phase]).run(program, context)[0]

    def pack(self, program: Program, directory: Path, progress: Progress) -> Packed:
        """Writes ``program.json`` and ``weights.safetensors``."""
        stored = save_program(_bare(program), directory, progress=progress)
        return Packed(_signature(program), LAYOUT_VERSION, stored)

    def predict_files(self, program: Program) -> dict[str, int]:
        """Exact sizes of ``program.json`` and ``weights.safetensors``."""
        return predict_program_files(_bare(program))


def _bare(program: Program) -> Program:
    """Without what the artifact holds in files of its own."""
    return replace(program, provenance=replace(program.provenance, config={}, assets={}))


def _format_reason(format: Format) -> str | None:
    return None if isinstance(format, IntegerFormat) else f"the cuda kernels have no {format}"


def _barrier_reason(node: fx.Node) -> str | None:
    if operator_name(node.target) is not None:
        return None
    return f"{format_target(node.target)}: no operator that a saved program may call"


def _signature(program: Program) -> Signature:
    name = _size_names(program)
    inputs, outputs = (
        tuple(_value_info(node, port, name) for node, port in zip(nodes, ports, strict=True))
        for nodes, ports in (
            (program.inputs, program.signature.inputs),
            (program.results, program.signature.outputs),
        )
    )
    return Signature(inputs=inputs, outputs=outputs)


def _size_names(program: Program) -> Callable[[Any], str]:
    """Names symbolic sizes: by what they mean to a language model, else by a number."""
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    for node, port in zip(program.inputs, program.signature.inputs, strict=True):
        for size, name in zip(node.meta["val"].shape, _ROLE_SIZES.get(port.role, ()), strict=False):
            if name is not None and is_symbolic(size) and expression(size).is_Symbol:
                names.setdefault(expression(size), sympy.Symbol(name))

    def name_of(size: Any) -> str:
        for symbol in sorted(expression(size).free_symbols, key=str):
            names.setdefault(symbol, sympy.Symbol(f"s{len(names)}"))
        return str(expression(size).xreplace(names))

    return name_of


def _value_info(node: fx.Node, port: Port, name: Callable[[Any], str]) -> ValueInfo:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise TargetError(f"'{port.name}' is no tensor, and cannot be passed to an artifact")
    return ValueInfo.model_validate(
        {
            "name": port.name,
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": [size if isinstance(size, int) else name(size) for size in value.shape],
            "role": port.role.value,
            "layer": port.layer,
        }
    )
