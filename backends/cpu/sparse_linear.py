"""Floats beside codes on the CPU library: the operator, its weight, its ONNX node.

A packed side is the columns of all rows, then their values in float16.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table
from qcompile.formats import SparseFormat, StoredWeight
from qcompile.formats.split import index_dtype
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.add_sparse.reference import add_sparse
from qcompile.kernels.cpu import OPERATOR_DOMAIN
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult
from qcompile.passes.lower.stored_linears import stored_linears

aten = torch.ops.aten

SPARSE_LINEAR = Table()
"""How the operator is written in ONNX."""


class FuseSparseLinear(Pass):
    """Takes floats beside codes out of the weight, which is left to the passes behind.

    ``linear(x, add_sparse(W, index, values), b)``  =>
    ``cpu_sparse_linear(x, packed side, linear(x, W, b))``
    """

    requires = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites every linear layer over a weight with floats beside it."""
        del context
        result = PassResult()
        editor = Editor(program)
        for linear, weight in stored_linears(program, SparseFormat):
            assert isinstance(weight.format, SparseFormat)
            x, _, *bias = linear.args
            n, k = weight.shape
            with editor.before(linear):
                plain = editor.call(aten.linear.default, x, weight.parts[0].value, *bias)
                packed = _packed(editor, weight)
                count = weight.format.count(k)
                new = editor.call(sparse_linear, x, packed, plain, n, k, count)
            editor.replace(linear, new)
            result.rewrites += 1
        if result.rewrites:
            program.graph.eliminate_dead_code()
        return result


def cpu_sparse_linear(
    x: Tensor, packed: Tensor, addend: Tensor, n: int, k: int, count: int
) -> Tensor:
    """A linear layer over few numbers, added to something: ``addend + x @ side.T``.

    Args:
        x: ``[..., k]`` float32.
        packed: The side as `pack_side` writes it, uint8.
        addend: ``[..., n]`` float32.
        n: Output features.
        k: Input features.
        count: Numbers in each row.

    Returns:
        ``[..., n]`` float32.
    """
    index, values = unpack_side(packed, n, k, count)
    side = add_sparse(x.new_zeros((n, k)), index, values)
    return addend + x @ side.T


def pack_side(index: Tensor, values: Tensor) -> Tensor:
    """Columns [n, count] and values [n, count] float16 as the kernel reads them, uint8."""
    return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in (index, values)])


def unpack_side(packed: Tensor, n: int, k: int, count: int) -> tuple[Tensor, Tensor]:
    """What `pack_side` was given."""
    dtype = index_dtype(k)
    at = n * count * dtype.itemsize
    index = packed[:at].clone().view(dtype)
    return index.reshape(n, count), packed[at:].clone().view(torch.float16).reshape(n, count)


def _packed(editor: Editor, weight: StoredWeight) -> fx.Node:
    program, name = editor.program, f"{weight.name}.side.packed"
    if name not in program.weights:
        operands = tuple(str(weight.tensors[part].target) for part in ("index", "values"))
        size = sum(program.weights.spec(operand).bytes for operand in operands)
        spec = TensorSpec((size,), torch.uint8)
        program.weights.derive(name, operands, pack_side, spec, exact=True, label="pack")
    return editor.weight(name)


def _shape(x: Tensor, packed: Tensor, addend: Tensor, *rest: object) -> Tensor:
    del x, packed, rest
    return torch.empty_like(addend)


sparse_linear = dialect.define(cpu_sparse_linear, shape=_shape, differentiable=False)


@SPARSE_LINEAR.register(sparse_linear)
def _emit(
    b: Builder, x: ir.Value, packed: ir.Value, addend: ir.Value, n: int, k: int, count: int
) -> ir.Value:
    return b.op(
        "SparseLinear",
        *(x, packed, addend),
        domain=OPERATOR_DOMAIN,
        dtype=ir.DataType.FLOAT,
        N=n,
        K=k,
        count=count,
    )
