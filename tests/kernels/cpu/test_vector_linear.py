"""The operator over vector codebooks against the reference of its lowered node."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.kernels.cpu.conftest import drawn

from qcompile.backends.cpu.vector_linear import (
    cpu_vector_linear,
    pack_rows,
    packed_bytes,
    unpack_rows,
)
from qcompile.formats import VectorFormat, parse_format

FORMATS = (
    "higgs1x8-g32-unturned",
    "higgs1x16-unturned",
    "higgs2x16-g16-unturned",
    "higgs2x32-g64-bf16-unturned",
    "higgs2x64-g64-unturned",
    "higgs2x256-g64-fp32-unturned",
    "higgs4x256-g64-unturned",
)


def make(name: str, n: int, k: int) -> tuple[VectorFormat, torch.Tensor, torch.Tensor]:
    format = parse_format(name)
    assert isinstance(format, VectorFormat)
    encoded = format.encode(torch.randn(n, k, generator=torch.Generator().manual_seed(n)))
    return format, encoded.tensors["codes"], encoded.tensors["scale"]


def attributes(format: VectorFormat, n: int, k: int) -> dict[str, int]:
    types = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
    return {
        "N": n,
        "K": k,
        "bits": format.code_bits,
        "dimension": format.dimension,
        "group_size": format.group_size,
        "scale_dtype": types[format.scale_dtype],
    }


def node_inputs(name: str, n: int, x: np.ndarray) -> tuple[list[np.ndarray], VectorFormat]:
    """Of a node with a weight of n rows: x, the packed weight and the codebook."""
    format, codes, scale = make(name, n, x.shape[-1])
    packed = pack_rows(codes, scale, format).numpy()
    return [x, packed, np.array(format.vectors, np.float32)], format


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 4), (13, 36), (24, 100), (5, 64)])
def test_packing_is_undone_and_of_true_size(name: str, n: int, k: int) -> None:
    format, codes, scale = make(name, n, k)
    packed = pack_rows(codes, scale, format)
    assert len(packed) == packed_bytes(n, k, format)
    exact = format.stored_bits((n, k)) / 8
    assert exact < len(packed) <= exact + n + 1  # rows begin at bytes
    unpacked = unpack_rows(packed, n, k, format)
    assert torch.equal(unpacked[0], codes)
    assert torch.equal(unpacked[1], scale)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("shape", "n"), [((1, 100), 13), ((2, 3, 576), 8), ((4, 36), 1)])
def test_products_match_the_reference(
    isa: str, run_node, name: str, shape: tuple[int, ...], n: int
) -> None:
    del isa
    k = shape[-1]
    inputs, format = node_inputs(name, n, drawn(*shape))
    bias = drawn(n)
    (y,) = run_node("VectorLinear", [*inputs, bias], **attributes(format, n, k))
    x, packed = (torch.from_numpy(value) for value in inputs[:2])
    bias64 = torch.from_numpy(bias).double()
    expected = cpu_vector_linear(x.double(), packed, bias64, n, k, str(format))
    # Sums of up to 576 float32 terms of size 1.
    np.testing.assert_allclose(y, expected.numpy(), rtol=0, atol=1e-4)


def test_products_are_the_same_for_every_number_of_threads(
    isa: str, assert_same_on_two_threads
) -> None:
    del isa
    n, k = 300, 576
    inputs, format = node_inputs("higgs2x64-g64-unturned", n, drawn(40, k))
    assert_same_on_two_threads("VectorLinear", inputs, **attributes(format, n, k))


def test_rows_together_are_what_they_are_apart(isa: str, run_node) -> None:
    del isa
    n, k, x = 21, 100, drawn(7, 100)
    inputs, format = node_inputs("higgs2x64-g64-unturned", n, x)
    (together,) = run_node("VectorLinear", inputs, **attributes(format, n, k))
    for row in range(len(x)):
        inputs[0] = x[row : row + 1]
        (alone,) = run_node("VectorLinear", inputs, **attributes(format, n, k))
        np.testing.assert_array_equal(together[row : row + 1], alone)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"K": 30}, "K = 30 does not hold whole vectors of 4"),
        ({"N": 7}, "the packed weight has shape"),
        ({"bits": 9}, "bits = 9 is not supported"),
        ({"bits": 7}, "the packed weight has shape|the codebook has shape"),
        ({"group_size": 30}, "group_size = 30 does not hold whole vectors"),
        ({"scale_dtype": 3}, "scale_dtype = 3 is none of"),
        ({"N": 0}, "are no size of a weight"),
    ],
)
def test_what_does_not_fit_is_refused(run_node, changed: dict[str, int], message: str) -> None:
    inputs, format = node_inputs("higgs4x256-g64-unturned", 8, drawn(2, 32))
    with pytest.raises(Exception, match=f"the_node.*({message})"):
        run_node("VectorLinear", inputs, **{**attributes(format, 8, 32), **changed})
