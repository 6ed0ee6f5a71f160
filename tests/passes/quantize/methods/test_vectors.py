"""Vector codebooks in the error-compensating sweep."""

import pytest
import torch

from qcompile.calibration.statistics import Hessian
from qcompile.errors import RecipeError
from qcompile.formats import VectorFormat, parse_format
from qcompile.kernels.lookup_vectors.reference import codebook_tensor, turn
from qcompile.passes.quantize.methods import Task, make_method
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.hessian import Inputs

FORMATS = ["higgs2x64-g32", "higgs4x256-g32", "higgs2x16", "higgs1x8-g48", "higgs2x64-unturned"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(rows: torch.Tensor) -> Inputs:
    hessian = Hessian()
    hessian.update(rows)
    return Inputs(hessian)


def correlated(width: int) -> Inputs:
    return seen(random(4 * width, width, seed=1) @ random(width, width, seed=2))


def task(weight: torch.Tensor, format: str, inputs: Inputs) -> Task:
    return Task("w", weight, parse_format(format), "mse", inputs)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"static_groups": True}], ids=str)
def test_sweeping_brings_outputs_much_nearer(format: str, options: dict[str, bool]) -> None:
    given = task(random(24, 96), format, correlated(96))
    swept = make_method("gptq", options).quantize(given).weight
    rounded = given.format.encode(given.weight, scale_search="mse")
    errors = [
        given.seen.relative_error(given.weight, weight.format.decode(weight))
        for weight in (rounded, swept)
    ]
    # The pivots of these moments are half as large as their diagonal.
    assert errors[1] < 0.7 * errors[0]
    assert {n: (t.shape, t.dtype) for n, t in swept.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in rounded.tensors.items()
    }


@pytest.mark.parametrize("method", ["owq", "quik", "slim", "mixed"])
def test_methods_that_end_in_the_sweep_take_vectors_too(method: str) -> None:
    given = task(random(24, 96), "higgs2x64-g32", correlated(96))
    made = make_method(method, {}).quantize(given).weight
    swept = Gptq().quantize(given).weight
    assert torch.equal(made.tensors["codes"], swept.tensors["codes"])


def test_ranges_of_vectors_cannot_be_made_smaller() -> None:
    with pytest.raises(
        RecipeError, match="higgs2x64-g32 of 'w' does not store one code per weight"
    ):
        make_method("magr").quantize(task(random(24, 96), "higgs2x64-g32", correlated(96)))


@pytest.mark.parametrize("format", FORMATS)
def test_independent_inputs_leave_nothing_to_make_up_for(format: str) -> None:
    basis, _ = torch.linalg.qr(random(96, 96, seed=3))
    given = task(random(24, 96), format, seen(basis))
    swept = Gptq(static_groups=True).quantize(given).weight
    rounded = given.format.encode(given.weight, scale_search="mse")
    assert torch.equal(swept.tensors["scale"], rounded.tensors["scale"])
    # Searched scales are those of the better of two rounds; codes are of the last ones tried.
    assert (swept.tensors["codes"] == rounded.tensors["codes"]).double().mean() > 0.99


@pytest.mark.parametrize("format", ["higgs2x64-unturned", "higgs4x256-unturned"])
def test_no_other_vector_would_serve_the_output_better(format: str) -> None:
    """A weight of one vector: the sweep's choice is the best of all codes."""
    parsed = parse_format(format)
    assert isinstance(parsed, VectorFormat)
    size = parsed.dimension
    given = task(random(50, size), format, correlated(size))
    swept = Gptq(damping=0.0).quantize(given).weight
    scale = swept.tensors["scale"].float()
    moments = given.seen.hessian.matrix.float()

    def error(decoded: torch.Tensor) -> torch.Tensor:
        left = decoded - given.weight.unsqueeze(-2)
        return ((left @ moments) * left).sum(-1)

    every = codebook_tensor(parsed.codebook) * scale.unsqueeze(-1)  # [rows, codes, size]
    chosen = error(parsed.decode(swept).unsqueeze(-2)).squeeze(-1)
    torch.testing.assert_close(chosen, error(every).amin(-1), rtol=1e-4, atol=1e-4)


def test_turned_inputs_see_turned_weights_as_the_layer_sees_its_own() -> None:
    inputs = correlated(96)
    turned = inputs.turned(48)
    weight = random(8, 96)
    assert turned.energy(turn(weight, 48)) == pytest.approx(inputs.energy(weight), rel=1e-5)
    assert inputs.turned(48) is turned
