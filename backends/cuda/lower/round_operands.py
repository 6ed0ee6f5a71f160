"""What tensor cores multiply."""

from __future__ import annotations

from typing import ClassVar

from qcompile.backends.cuda import ops
from qcompile.errors import TargetError
from qcompile.ir.program import Program
from qcompile.kernels.quantized_linear.reference import ROUNDINGS
from qcompile.passes.infra import Context, Lossy, Numerics, Pass, PassResult


class RoundOperands(Pass):
    """``quantized_linear(x, ..., "none")``  =>  ``quantized_linear(x, ..., "float16")``.

    Operands are rounded to half precision as the tensor cores take them; sums, and all other
    operators, stay in float32.

    Args:
        rounding: ``"float16"``, ``"bfloat16"``, or ``"none"``, which leaves the program as it is.

    Raises:
        TargetError: If `rounding` is something else.
    """

    numerics: ClassVar[Numerics] = Lossy()

    def __init__(self, rounding: str) -> None:
        if rounding not in ROUNDINGS:
            raise TargetError(
                f"operands cannot be rounded to '{rounding}'",
                remedy=f"use one of {', '.join(ROUNDINGS)}",
            )
        self._rounding = rounding

    def run(self, program: Program, context: Context) -> PassResult:
        """Changes every quantized linear."""
        del context
        result = PassResult()
        if ROUNDINGS[self._rounding] is None:
            return result
        for node in program.calls(ops.linear):
            node.update_arg(len(node.args) - 1, self._rounding)
            result.rewrites += 1
        return result
