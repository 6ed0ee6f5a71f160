"""Linear layers over vector codebooks on the CPU library: the operator, its weight, its ONNX node.

A packed weight is its rows one after the other, and one byte more at the end: of each row the
scales of its groups, then its codes at their width, lowest bits first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table
from qcompile.errors import TargetError
from qcompile.formats import StoredWeight, VectorFormat, parse_format
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.cpu import OPERATOR_DOMAIN
from qcompile.kernels.lookup_vectors.reference import lookup_vectors
from qcompile.kernels.quantize.groups import group_count
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult
from qcompile.passes.lower.stored_linears import stored_linears

VECTOR_LINEAR = Table()
"""How the operator is written in ONNX."""

_SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class FuseVectorLinear(Pass):
    """``linear(x, lookup_vectors(W), b)``  =>  ``cpu_vector_linear(x, packed W, b)``.

    Weights must not be turned any more; see `qcompile.passes.lower.turn_inputs`.
    """

    requires = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites every linear layer over a vector codebook."""
        del context
        result = PassResult()
        editor = Editor(program)
        for linear, weight in stored_linears(program, VectorFormat):
            assert isinstance(weight.format, VectorFormat)
            if weight.format.turned:
                raise TargetError(f"weight '{weight.name}' is turned, and its inputs are not")
            bias = linear.args[2] if len(linear.args) > 2 else None
            with editor.before(linear):
                packed, format = _packed(editor, weight), str(weight.format)
                new = editor.call(
                    vector_linear, linear.args[0], packed, bias, *weight.shape, format
                )
            editor.replace(linear, new)
            result.rewrites += 1
        return result


def cpu_vector_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, n: int, k: int, format: str
) -> Tensor:
    """A linear layer over a packed weight: ``x @ w.T + bias``.

    Args:
        x: ``[..., k]`` float32.
        packed: The weight as `pack_rows` writes it, uint8.
        bias: ``[n]`` or None.
        n: Output features.
        k: Input features.
        format: Name of the weight's `VectorFormat`, unturned.

    Returns:
        ``[..., n]`` float32.
    """
    known = _format(format)
    codes, scale = unpack_rows(packed, n, k, known)
    weight = lookup_vectors(codes, scale, known.codebook, known.group_size, 0)
    y = x @ weight.to(x.dtype).T
    return y if bias is None else y + bias


def pack_rows(codes: Tensor, scale: Tensor, format: VectorFormat) -> Tensor:
    """Codes [n, k / dimension] and scales [n, G] as the kernel reads them, uint8."""
    bits = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")
    packed = np.packbits(
        bits[..., : format.code_bits].reshape(len(codes), -1), axis=-1, bitorder="little"
    )
    scales = scale.to(format.scale_dtype).contiguous().view(torch.uint8).numpy()
    rows = np.concatenate((scales, packed), axis=1).reshape(-1)
    return torch.from_numpy(np.append(rows, np.uint8(0)))


def unpack_rows(packed: Tensor, n: int, k: int, format: VectorFormat) -> tuple[Tensor, Tensor]:
    """What `pack_rows` was given."""
    rows: npt.NDArray[np.uint8] = packed.cpu().numpy()[:-1].reshape(n, -1)
    at = group_count(k, format.group_size) * format.scale_dtype.itemsize
    scale = torch.from_numpy(rows[:, :at].copy()).view(format.scale_dtype)
    count = k // format.dimension
    bits = np.unpackbits(rows[:, at:], axis=1, count=count * format.code_bits, bitorder="little")
    padded = np.zeros((n, count, 8), np.uint8)
    padded[..., : format.code_bits] = bits.reshape(n, count, -1)
    codes = np.packbits(padded, axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy(codes), scale


def packed_bytes(n: int, k: int, format: VectorFormat) -> int:
    """The length of what `pack_rows` writes."""
    scales = group_count(k, format.group_size) * format.scale_dtype.itemsize
    return int(n * (scales + -(-k // format.dimension * format.code_bits // 8)) + 1)


def _packed(editor: Editor, weight: StoredWeight) -> fx.Node:
    format = weight.format
    assert isinstance(format, VectorFormat)
    program, name = editor.program, f"{weight.name}.codes.packed"
    if name not in program.weights:
        n, k = weight.shape
        program.weights.derive(
            name,
            (str(weight.tensors["codes"].target), str(weight.tensors["scale"].target)),
            lambda codes, scale: pack_rows(codes, scale, format),
            TensorSpec((packed_bytes(n, k, format),), torch.uint8),
            exact=True,
            label="pack",
        )
    return editor.weight(name)


def _format(name: str) -> VectorFormat:
    format = parse_format(name)
    assert isinstance(format, VectorFormat)
    return format


def _shape(x: Tensor, packed: Tensor, bias: Tensor | None, n: int, *rest: object) -> Tensor:
    del packed, bias, rest
    return x.new_empty((*x.shape[:-1], n))


vector_linear = dialect.define(cpu_vector_linear, shape=_shape, differentiable=False)


@VECTOR_LINEAR.register(vector_linear)
def _emit(
    b: Builder,
    x: ir.Value,
    packed: ir.Value,
    bias: ir.Value | None,
    n: int,
    k: int,
    format: str,
) -> ir.Value:
    known = _format(format)
    return b.op(
        "VectorLinear",
        *(x, packed, b.constant(known.vectors, ir.DataType.FLOAT), bias),
        domain=OPERATOR_DOMAIN,
        dtype=ir.DataType.FLOAT,
        N=n,
        K=k,
        bits=known.code_bits,
        dimension=known.dimension,
        group_size=known.group_size,
        scale_dtype=_SCALE_TYPES[known.scale_dtype],
    )
