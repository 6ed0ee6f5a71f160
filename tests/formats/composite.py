"""What holds of every format that is made of others, and a program that has a weight of one."""

import pytest
import torch

import qcompile as qc
from qcompile.errors import ModelError
from qcompile.formats import parse_format, stored_weight
from qcompile.passes.infra import Context
from qcompile.passes.quantize.bits import count_bits
from qcompile.passes.quantize.quantize_weights import QuantizeWeights

SHAPE = (24, 96)
"""Of the weight in `quantized_program`."""


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_name(name, kind):
    """A name is canonical, and reads back as an equal format of a kind."""
    format = parse_format(name)
    assert isinstance(format, kind)
    assert str(format) == name
    assert parse_format(str(format)) == format


def encoded_as_declared(name, shape, seed):
    """A weight in a format, whose tensors are those that the format declares."""
    format = parse_format(name)
    quantized = format.encode(normal(*shape, seed=seed))
    assert {name: (tuple(t.shape), t.dtype) for name, t in quantized.tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in format.tensors(shape).items()
    }
    return quantized


def check_overflow_is_named(name):
    """A number that float16 cannot hold is refused with the name of the weight; returns it."""
    weight = normal(2, 16)
    weight[0, 3] = 1e6
    with pytest.raises(ModelError, match="'w' has values too large for fp16"):
        parse_format(name).encode(weight, name="w")
    return weight


def float_program(bias=True):
    """One linear layer, ``0.weight`` of `SHAPE`."""
    torch.manual_seed(0)
    rows, columns = SHAPE
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=bias))
    return qc.capture(model, normal(5, columns))


def quantized_program(name, bias=True):
    """The same, with its weight in a format."""
    program = float_program(bias)
    QuantizeWeights(name).run(program, Context())
    program.verify()
    return program


def one_stored_weight(program, name):
    """The weight of such a program, which is found as one and whose bits are all counted."""
    (linear,) = program.calls(torch.ops.aten.linear.default)
    stored = stored_weight(linear.args[1])
    assert (stored.name, stored.shape) == ("0.weight", SHAPE)
    tensors = count_bits(program).tensors
    (counted,) = [tensor for tensor in tensors if tensor.quantized]
    assert (counted.name, counted.bits) == ("0.weight", parse_format(name).stored_bits(SHAPE))
    assert [tensor.name for tensor in tensors if not tensor.quantized] == ["0.bias"]
    return stored
