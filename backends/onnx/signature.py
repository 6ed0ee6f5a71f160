"""What the manifest says of the inputs and outputs of a model."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.backends.onnx.emitter import OnnxGraph
from qcompile.ir.program import Program
from qcompile.ir.types import Port
from qcompile.manifest import Signature, ValueInfo


def signature_of(graph: OnnxGraph, program: Program) -> Signature:
    """The inputs and outputs of a model, with the roles that the program gives them."""
    ports, values = program.signature, graph.model.graph
    return Signature(
        inputs=tuple(map(_value_info, values.inputs, ports.inputs)),
        outputs=tuple(map(_value_info, values.outputs, ports.outputs)),
    )


def _value_info(value: ir.Value, port: Port) -> ValueInfo:
    assert value.dtype is not None
    assert value.shape is not None
    return ValueInfo.model_validate(
        {
            "name": port.name,
            "dtype": value.dtype.numpy().name,
            "shape": [size if isinstance(size, int) else str(size) for size in value.shape],
            "role": port.role.value,
            "layer": port.layer,
        }
    )
