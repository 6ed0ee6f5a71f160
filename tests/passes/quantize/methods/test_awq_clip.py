from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile.calibration.statistics import Hessian
from qcompile.formats import Format, QuantizedWeight, parse_format
from qcompile.passes.quantize.methods import Task
from qcompile.passes.quantize.methods.awq_clip import AwqClip
from qcompile.passes.quantize.methods.hessian import Inputs

FORMATS = ["int4-g32-asym", "int3-g32", "int3"]


def rows() -> Tensor:
    """Inputs whose channels differ in size and depend on each other."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(400, 80, generator=generator) @ torch.randn(80, 80, generator=generator)
    return mixed * torch.linspace(0.05, 2, 80)


def weight() -> Tensor:
    """Heavy tails, as weights have, and a short last group."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 80, generator=generator) * torch.rand(24, 80, generator=generator).exp()


def clipped(format: Format, exact: Tensor, inputs: Tensor) -> QuantizedWeight:
    seen = Hessian()
    seen.update(inputs)
    return AwqClip().quantize(Task("w", exact, format, "absmax", Inputs(seen))).weight


def group_errors(format: Format, quantized: QuantizedWeight, inputs: Tensor) -> Tensor:
    """Squared errors of outputs by row and group, as if the other groups were exact."""
    size = format.group_size or inputs.shape[1]
    error = format.decode(quantized) - weight()
    parts = zip(error.split(size, 1), inputs.split(size, 1), strict=True)
    return torch.stack([(x @ e.T).square().sum(0) for e, x in parts])


@pytest.mark.parametrize("name", FORMATS)
def test_no_group_loses_to_its_whole_range_and_all_together_gain(name: str) -> None:
    format, exact, inputs = parse_format(name), weight(), rows()
    found = group_errors(format, clipped(format, exact, inputs), inputs)
    whole = group_errors(format, format.encode(exact), inputs)
    assert bool((found <= whole * (1 + 1e-4)).all())  # products of float32 matrices
    assert found.sum() < 0.9 * whole.sum()


def test_inputs_decide_where_to_clip() -> None:
    format, exact = parse_format("int3-g32"), weight()
    equal, skewed = torch.eye(80), torch.eye(80) * torch.linspace(0.01, 3, 80)
    found = [clipped(format, exact, inputs) for inputs in (equal, skewed)]
    by_weight = format.encode(exact, scale_search="mse")
    # With inputs that are all alike, it is the search for the least error of weights.
    assert torch.equal(found[0].tensors["codes"], by_weight.tensors["codes"])
    assert not torch.equal(found[1].tensors["scale"], by_weight.tensors["scale"])
    errors = [group_errors(format, q, skewed).sum() for q in (found[1], by_weight)]
    assert errors[0] < errors[1]
