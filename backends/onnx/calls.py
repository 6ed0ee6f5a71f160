"""Nodes of the model before it is known whether anything uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

Attribute = bool | int | float | str | ir.Graph | Sequence[int] | Sequence[float]
"""What an attribute of an ONNX operator may be; None leaves the attribute out."""


@dataclass(frozen=True, eq=False)
class Call:
    """A node of the model before it is known whether anything uses it."""

    op_type: str
    domain: str
    inputs: tuple[ir.Value | None, ...]
    outputs: tuple[ir.Value, ...]
    attributes: tuple[ir.Attr, ...]


def output_dtype(op_type: str, inputs: Sequence[ir.Value | None]) -> ir.DataType:
    """The type of an operator's outputs, from its name and the types of its inputs."""
    if op_type in _BOOLEAN:
        return ir.DataType.BOOL
    if op_type in _INTEGER:
        return ir.DataType.INT64
    source = inputs[1] if op_type == "Where" else inputs[0]
    if source is None or source.dtype is None:
        raise AssertionError(f"the type of {op_type}'s output must be given")
    return source.dtype


def to_attribute(name: str, value: Attribute) -> ir.Attr:
    """A Python value as an attribute of the type that fits it."""
    if isinstance(value, (bool, int)):
        return ir.AttrInt64(name, int(value))
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, ir.Graph):
        return ir.AttrGraph(name, value)
    if any(isinstance(item, float) for item in value):
        return ir.AttrFloat32s(name, [float(item) for item in value])
    return ir.AttrInt64s(name, [int(item) for item in value])


_BOOLEAN = frozenset(
    {"Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor", "Not"}
    | {"IsNaN", "IsInf"}
)
_INTEGER = frozenset({"Shape", "ArgMax", "ArgMin", "NonZero"})
