"""The small values that translations work with: dtypes, sizes, weights by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import sympy
import torch
from torch import Tensor

from qcompile.ir.weights import TensorSpec


@dataclass(frozen=True, eq=False)
class SymbolicScalar:
    """A number that only the run knows: a size, or arithmetic on sizes.

    Attributes:
        value: A tensor of shape ``[1]``: int64 for sizes, double or bool for what follows from
            them. One element rather than none, since shapes are concatenated from such tensors.
    """

    value: ir.Value


Size = int | SymbolicScalar
"""One entry of a shape."""

Number = bool | int | float | SymbolicScalar

Operand = ir.Value | SymbolicScalar | bool | int | float
"""What a translation may receive where an operator takes a tensor or a number."""

Axis = int | torch.SymInt
"""One entry of the shape of a fake tensor."""


class UnsupportedError(Exception):
    """Raised by a translation for arguments that it has no ONNX for; the reason is one clause."""


@dataclass(frozen=True)
class Packed:
    """A tensor of elements narrower than a byte, the first of them in the lowest bits.

    Attributes:
        dtype: Type of an element.
        shape: Number of elements along each axis.
    """

    dtype: ir.DataType
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class WeightTensor:
    """An initializer whose numbers come from a program's weight store when the model is written.

    Attributes:
        weight: Its name in the store.
        spec: Shape and dtype of what is written.
        arrange: From the stored tensor to what is written; None is as is.
        packed: Type and shape in the model where several elements share a byte of `spec`.
    """

    weight: str
    spec: TensorSpec
    arrange: Callable[[Tensor], Tensor] | None = None
    packed: Packed | None = None

    @property
    def dtype(self) -> ir.DataType:
        """Type in the model."""
        return to_ir_dtype(self.spec.dtype) if self.packed is None else self.packed.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the model."""
        return self.spec.shape if self.packed is None else self.packed.shape


_DTYPES: dict[torch.dtype, ir.DataType] = {
    torch.bool: ir.DataType.BOOL,
    torch.uint8: ir.DataType.UINT8,
    torch.int8: ir.DataType.INT8,
    torch.uint16: ir.DataType.UINT16,
    torch.int16: ir.DataType.INT16,
    torch.uint32: ir.DataType.UINT32,
    torch.int32: ir.DataType.INT32,
    torch.uint64: ir.DataType.UINT64,
    torch.int64: ir.DataType.INT64,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.float8_e5m2: ir.DataType.FLOAT8E5M2,
}

_WIDER: dict[ir.DataType, ir.DataType] = {
    ir.DataType.BOOL: ir.DataType.INT32,
    ir.DataType.UINT8: ir.DataType.INT32,
    ir.DataType.INT8: ir.DataType.INT32,
    ir.DataType.UINT16: ir.DataType.INT32,
    ir.DataType.INT16: ir.DataType.INT32,
    ir.DataType.FLOAT16: ir.DataType.FLOAT,
    ir.DataType.BFLOAT16: ir.DataType.FLOAT,
}


def to_ir_dtype(dtype: torch.dtype) -> ir.DataType:
    """The ONNX type of a torch type.

    Raises:
        UnsupportedError: If ONNX has none.
    """
    if dtype not in _DTYPES:
        raise UnsupportedError(f"ONNX has no type for {dtype}")
    return _DTYPES[dtype]


def computing_dtype(dtype: ir.DataType) -> ir.DataType:
    """The type to compute in: run times have few kernels for narrow types, and torch itself
    computes half precision in single.
    """
    return _WIDER.get(dtype, dtype)


def is_floating(dtype: ir.DataType) -> bool:
    """Whether a type holds fractions."""
    return dtype in _FLOATING


_FLOATING = frozenset(
    {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
)


def expression(size: Axis) -> sympy.Expr:
    """A size as an expression over the program's symbols."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def static_size(size: Axis) -> int | None:
    """A size as a number if it is one, without asking the tracer (which would add a guard)."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr) if expr.is_Integer else None


def static_shape(shape: Sequence[Axis]) -> tuple[int, ...] | None:
    """A shape as numbers, or None if any of its sizes is symbolic."""
    sizes = [static_size(size) for size in shape]
    return None if None in sizes else tuple(size for size in sizes if size is not None)


def same_size(a: Axis, b: Axis) -> bool:
    """Whether two sizes are equal for all values of the symbols, as far as their form shows."""
    return a is b or expression(a) == expression(b)


def may_be_zero(size: Axis) -> bool:
    """Whether a size can be 0 in some run."""
    if isinstance(size, int):
        return size == 0
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    return not bounds.lower > 0


def same_shape(a: Sequence[Axis], b: Sequence[Axis]) -> bool:
    """Whether two shapes are equal for all values of the symbols, as far as their form shows."""
    return len(a) == len(b) and all(map(same_size, a, b))


def constant_target(known: Sequence[Axis], shape: Sequence[Axis]) -> list[int] | None:
    """A shape with at most one -1 and with 0 for axes that stay, or None if that cannot say it."""
    numbers = static_shape(shape)
    if numbers is not None:
        return None if 0 in numbers else list(numbers)
    target = []
    for i, size in enumerate(shape):
        number = static_size(size)
        if number is not None:
            target.append(number)
        elif i < len(known) and same_size(known[i], size):
            target.append(0)
        else:
            target.append(-1)
    # What remains cannot be found by dividing by zero.
    others = [size for size, entry in zip(shape, target, strict=True) if entry != -1]
    ambiguous = target.count(-1) > 1 or (-1 in target and any(map(may_be_zero, others)))
    wrong_zero = any(size == 0 for size in shape if isinstance(size, int))
    return None if ambiguous or wrong_zero else target
