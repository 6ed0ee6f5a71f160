"""LLM-FP4: the split of bits follows the weights, and biases the layer's output."""

import pytest
import torch

from qcompile.calibration.statistics import Hessian
from qcompile.formats import parse_format
from qcompile.passes.quantize.methods import Task, make_method
from qcompile.passes.quantize.methods.hessian import Inputs
from qcompile.passes.quantize.methods.llm_fp4 import LlmFp4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(width: int) -> Inputs:
    """Of channels that are larger and larger, and correlated."""
    x = random(512, width, seed=1) @ random(width, width, seed=2)
    hessian = Hessian()
    hessian.update(x * torch.linspace(0.1, 3, width))
    return Inputs(hessian)


def task(weight: torch.Tensor, format: str = "fp4") -> Task:
    return Task("w", weight, parse_format(format), "absmax", inputs(weight.shape[1]))


@pytest.mark.parametrize("format", ["fp4", "fp4-g16", "fp4-g24-bf16", "nvfp4"])
def test_outputs_are_nearer_than_with_round_to_nearest(format: str) -> None:
    given = task(random(24, 96), format)
    searched = LlmFp4().quantize(given).weight
    errors = []
    for weight in (given.format.encode(given.weight, scale_search="mse"), searched):
        decoded = weight.format.decode(weight)
        errors.append(given.seen.relative_error(given.weight, decoded))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("weight", "table"),
    [
        (torch.rand(32, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1, "e1m2"),
        (random(32, 64), "e2m1"),
        (random(32, 64).sign() * 2.0 ** -(random(32, 64, seed=4).abs() * 3).round(), "e3m0"),
    ],
    ids=["uniform", "normal", "powers of two"],
)
def test_the_split_follows_the_distribution(weight: torch.Tensor, table: str) -> None:
    format = LlmFp4().quantize(task(weight)).weight.format
    assert format == parse_format(table)


def test_biases_are_real_numbers_of_each_row() -> None:
    made = LlmFp4().quantize(task(random(24, 96))).weight
    exponents = made.tensors["scale"].double().log2()
    assert exponents.shape == (24, 1)
    assert bool(((exponents - exponents.round()).abs() > 0.01).any())


def test_more_biases_are_never_worse() -> None:
    given = task(random(24, 96))
    coarse, fine = (LlmFp4(steps=steps).quantize(given).weight for steps in (2, 16))
    found = [
        given.seen.relative_error(given.weight, made.format.decode(made)) for made in (coarse, fine)
    ]
    assert found[1] <= found[0]


def test_other_formats_are_rounded_to_nearest_and_say_so() -> None:
    given = task(random(4, 32), "nf4-g16")
    outcome = make_method("llm_fp4").quantize(given)
    assert outcome.notes == ("nf4-g16 is no small float: rounded to nearest",)
    rounded = given.format.encode(given.weight)
    assert torch.equal(outcome.weight.tensors["codes"], rounded.tensors["codes"])
