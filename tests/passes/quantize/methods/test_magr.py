import pytest
import torch

from qcompile.calibration.statistics import Hessian
from qcompile.formats import parse_format
from qcompile.passes.quantize.methods import Task
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.hessian import Inputs
from qcompile.passes.quantize.methods.magr import Magr, reduce_magnitude


def problem(noise=0.05):
    """48 inputs of which 16 directions carry most: outputs leave weights freedom."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(16, 48, generator=generator)
    x = torch.randn(400, 16, generator=generator) @ basis
    x += noise * torch.randn(400, 48, generator=generator)
    hessian = Hessian()
    hessian.update(x)
    return torch.randn(24, 48, generator=generator), Inputs(hessian)


@pytest.mark.parametrize("group", [0, 20])
def test_largest_weights_shrink_and_outputs_stay(group):
    weight, inputs = problem()
    found = reduce_magnitude(weight, inputs.hessian.matrix, alpha=0.01, group=group, steps=1000)
    assert float(found.abs().amax(1).mean()) < 0.8 * float(weight.abs().amax(1).mean())
    assert inputs.relative_error(weight, found) < 1e-3


def test_without_weight_on_magnitudes_nothing_moves():
    weight, inputs = problem()
    found = reduce_magnitude(weight, inputs.hessian.matrix, alpha=1e-9, group=0, steps=50)
    torch.testing.assert_close(found, weight)


def test_solution_is_stationary():
    """The gradient of a row lies on its largest weights alone, and sums to alpha."""
    weight, inputs = problem(noise=2.0)
    alpha = 1e-2
    found = reduce_magnitude(weight, inputs.hessian.matrix, alpha=alpha, group=0, steps=2000)
    matrix = inputs.hessian.matrix / torch.linalg.eigvalsh(inputs.hessian.matrix)[-1]
    gradient = -((found - weight).double() @ matrix) * found.sign()
    torch.testing.assert_close(
        gradient.sum(1), torch.full((24,), alpha, dtype=torch.float64), rtol=0.02, atol=0
    )
    small = found.abs() < found.abs().amax(1, keepdim=True) * 0.999
    assert float(gradient[small].abs().max()) < 0.02 * alpha


@pytest.mark.parametrize("name", ["int3", "int4"])
def test_smaller_ranges_gain_over_gptq_alone(name):
    weight, inputs = problem()
    format = parse_format(name)
    task = Task("w", weight, format, "absmax", inputs)

    def error(method):
        return inputs.relative_error(weight, format.decode(method.quantize(task).weight))

    assert error(Magr(alpha=0.01, steps=1000)) < 0.7 * error(Gptq())
