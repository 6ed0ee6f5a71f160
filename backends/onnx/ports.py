"""Names of the sizes that vary from call to call, and the model's inputs and outputs with them."""

from __future__ import annotations

import onnx_ir as ir
import sympy
from torch import Tensor

from qcompile.backends.onnx.values import Axis, expression, static_size
from qcompile.ir.program import Program
from qcompile.ir.types import Port, Role

_AXES: dict[Role, tuple[str | None, ...]] = {
    Role.INPUT_IDS: ("batch", "query"),
    Role.TOKEN_TYPE_IDS: ("batch", "query"),
    Role.POSITION_IDS: ("batch", "query"),
    Role.PAST_KEY: ("batch", None, "past", None),
    Role.PAST_VALUE: ("batch", None, "past", None),
    Role.PAST_STATE: ("batch",),
    Role.ATTENTION_MASK: ("batch", "total"),
}
"""What the axes of an input mean, by its role; the order decides who names a size first."""


class DimensionNames:
    """Names for a program's symbolic sizes that do not depend on how the tracer numbered them.

    ``batch``, ``query`` and ``past`` for language models; for others, ``batch`` for the first axis
    of the first input and ``<input>_<axis>`` for every other axis. Sizes that follow from these are
    written as expressions: ``past + query``.

    Args:
        program: Whose symbols to name.
    """

    def __init__(self, program: Program) -> None:
        self._names: dict[sympy.Symbol, sympy.Symbol] = {}
        self._texts: dict[sympy.Expr, str] = {}
        ports = list(zip(program.signature.inputs, program.inputs, strict=True))
        order = [*_AXES, Role.TENSOR]
        known = [(p, n) for p, n in ports if p.role in _AXES]
        for port, node in sorted(known, key=lambda pair: order.index(pair[0].role)):
            self._name_axes(port, node.meta["val"], _AXES[port.role])
        for port, node in ports:
            self._name_axes(port, node.meta["val"], () if known else ("batch",))

    def shape(self, fake: Tensor) -> ir.Shape:
        """The shape of a tensor with its symbolic sizes named."""
        return ir.Shape([self.dimension(size) for size in fake.shape])

    def dimension(self, size: Axis) -> int | str:
        """A size as a number, or its name."""
        number = static_size(size)
        if number is not None:
            return number
        expr = expression(size)
        if expr not in self._texts:
            self._texts[expr] = str(expr.xreplace(self._names))
        return self._texts[expr]

    def _name_axes(self, port: Port, fake: Tensor, meanings: tuple[str | None, ...]) -> None:
        taken = {symbol.name for symbol in self._names.values()}
        for i, size in enumerate(fake.shape):
            expr = expression(size)
            if not isinstance(expr, sympy.Symbol) or expr in self._names:
                continue
            meaning = meanings[i] if i < len(meanings) else None
            fallback = f"{port.name}_{i}"
            name = fallback if meaning is None or meaning in taken else meaning
            self._names[expr] = sympy.Symbol(name)
            taken.add(name)
