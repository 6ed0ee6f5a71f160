from __future__ import annotations

import pytest
import torch
from tests.frontends.tiny_models import CORE
from tests.passes.transform.methods import (
    EQUIVALENT,
    apply,
    calibrated,
    function_error,
    tiny,
    values_of,
)
from torch import nn

import qcompile as qc
from qcompile.calibration.samples import ExampleInputs, TokenWindows
from qcompile.calibration.settings import Calibration
from qcompile.errors import DataError, RecipeError
from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, Pass
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.passes.transform.centre_norms import CentreNorms
from qcompile.passes.transform.fold_norm_gain import FoldNormGain
from qcompile.passes.transform.rotate import Rotate
from qcompile.passes.transform.smooth import Smooth
from qcompile.passes.transform.smoothing.methods import RULES, Magnitudes
from qcompile.passes.transform.smoothing.objective import row_energies

METHODS = ("smoothquant", "awq", "os+", "preshift")


def magnitudes() -> Magnitudes:
    largest = torch.tensor([1.0, 100.0, 4.0], dtype=torch.float64)
    return Magnitudes(largest, largest / 4, torch.tensor([1.0, 1.0, 0.25], dtype=torch.float64))


def test_rules_follow_their_papers() -> None:
    seen = magnitudes()
    half = RULES["smoothquant"].scale(seen, 0.5)
    torch.testing.assert_close(half, torch.tensor([1.0, 10.0, 4.0], dtype=torch.float64))
    awq = RULES["awq"].scale(seen, 0.5)
    # Square roots of 1/4, 25 and 1, over the root of the largest times the least.
    expected = torch.tensor([0.5, 5.0, 1.0], dtype=torch.float64) / 2.5**0.5
    torch.testing.assert_close(awq, expected)
    lifted = RULES["preshift"].scale(seen, 2.0**-7)
    assert torch.equal(lifted.log2(), lifted.log2().round().clamp(min=-7, max=0))
    beyond = RULES["os+"].scale(seen, 0.1)
    torch.testing.assert_close(beyond, torch.tensor([1.0, 10.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("name", CORE)
def test_smoothing_keeps_the_function_of_every_architecture(name: str) -> None:
    before = tiny(name)
    after, result = apply(before, Smooth(strength=0.6))
    assert function_error(before, after) < EQUIVALENT
    if name != "bert":
        assert result.rewrites > 0


@pytest.mark.parametrize("method", METHODS)
def test_searched_scales_never_lose_to_none(method: str) -> None:
    before = tiny("llama")
    after, result = apply(before, Smooth(method, weights="int4", activations="int4"))
    assert function_error(before, after) < EQUIVALENT
    assert all(d["error"] <= d["error_unscaled"] for d in result.details)  # type: ignore[operator]
    assert any(d["strength"] is not None for d in result.details)


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon-alibi"])
def test_outlier_suppression_centres_channels_behind_layer_norms(name: str) -> None:
    before = tiny(name)
    after, result = apply(before, Smooth("os+", strength=0.5))
    shifted = [detail for detail in result.details if "shifted" in detail]
    assert len(shifted) >= 2
    assert function_error(before, after) < EQUIVALENT
    norm = next(after.calls(dialect.layer_norm))
    (rows,) = values_of(after, norm)  # tokens that ranges were measured on
    low, high = rows.amin(0), rows.amax(0)
    torch.testing.assert_close(low, -high, rtol=0, atol=1e-5)


def test_grouped_heads_share_the_scale_of_their_value_head() -> None:
    _, result = apply(tiny("llama"), Smooth(strength=0.5))
    sinks = [detail["sinks"] for detail in result.details]
    assert ["model.layers.0.self_attn.o_proj.weight"] in sinks


def test_projection_to_the_vocabulary_is_left_alone() -> None:
    _, result = apply(tiny("llama"), Smooth(strength=0.5))
    assert any(skip.reason == "it makes the logits" for skip in result.skips)


def test_smoothing_after_rotation_says_why_norms_take_no_scale() -> None:
    _, result = apply(tiny("llama"), FoldNormGain(), CentreNorms(), Rotate(), Smooth(strength=0.5))
    assert any("no weight in front of it absorbs" in skip.reason for skip in result.skips)
    assert {d["sinks"][0].split(".")[-2] for d in result.details} == {"o_proj"}  # type: ignore[index]


def test_missing_calibration_data_is_named() -> None:
    with pytest.raises(DataError, match=r"smooth.*needs calibration data"):
        apply(tiny("llama"), Smooth(), context=Context())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "os"}, "unknown method 'os'"),
        ({"activations": "fp3"}, "activations cannot be 'fp3'"),
        ({"activations": "fp4-searched"}, "cannot round activations to 'fp4-searched'"),
        ({"activations": "int8-asym"}, "cannot round activations to 'int8-asym'"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Smooth(**options)  # type: ignore[arg-type]


# --- The model that methods must bring back -----------------------------------------------------


def with_artificial_outliers(program: Program, factor: float = 64.0) -> Program:
    """The same function with some gains of norms times 64 and what reads them over 64."""
    from qcompile.analysis.families import Family, PortRole
    from qcompile.analysis.sites import find_sites
    from qcompile.passes.transform.absorb import absorb
    from qcompile.passes.transform.values import Diagonal

    changed = program.copy()
    generator = torch.Generator().manual_seed(5)
    for site in find_sites(changed):
        gains = [p for p in site.ports if p.role is PortRole.SOURCE and "norm" in p.weight]
        if Family.DIAGONAL in site.families and gains and len(site.blocks) == 1:
            scale = torch.ones(site.size, dtype=torch.float64)
            scale[torch.randperm(site.size, generator=generator)[:2]] = factor
            absorb(changed, site, [Diagonal(scale)])
    return changed


def quantization_error(program: Program, *transforms: Pass) -> float:
    """Of the logits, at 8 bits for weights per channel and activations per tensor.

    It is measured on the tokens that ranges come from: with so few, others would be clipped.
    """
    quantize = (
        QuantizeWeights("int8", ignore=("lm_head*", "*embed*")),
        QuantizeActivations("int8", granularity="tensor"),
    )
    context = calibrated(8, 32)
    after, _ = apply(program, *transforms, *quantize, context=context)
    data = context.calibration.data
    assert isinstance(data, TokenWindows)
    ids = torch.from_numpy(data.tokens)
    expected, found = program(ids).logits, after(ids).logits
    return float((found - expected).norm() / expected.norm())


def test_artificial_outliers_come_back_by_smoothing_or_rotation() -> None:
    clean = tiny("llama")
    spoiled = with_artificial_outliers(clean)
    assert function_error(clean, spoiled) < EQUIVALENT
    usual = quantization_error(clean)
    assert quantization_error(spoiled) > 4 * usual
    smoothed = quantization_error(spoiled, Smooth(granularity="tensor"))
    rotated = quantization_error(spoiled, FoldNormGain(), CentreNorms(), Rotate())
    assert smoothed < 1.5 * usual
    assert rotated < 1.5 * usual


# --- One token that is far larger than all others ------------------------------------------------


class Feed(nn.Module):
    """A feed-forward part; one hidden channel stands up for one direction of inputs alone."""

    def __init__(self, size: int = 16, hidden: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(size, hidden, bias=False)
        self.up = nn.Linear(size, hidden, bias=False)
        self.down = nn.Linear(hidden, size, bias=False)
        with torch.no_grad():
            for layer in (self.gate, self.up):
                layer.weight[:, 0] = 0.0
                layer.weight[3, 0] = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.silu(self.gate(x)) * self.up(x)
        down: torch.Tensor = self.down(hidden)
        return down


def with_a_giant() -> torch.Tensor:
    """Ordinary tokens, and one that makes a hidden channel hundreds of times as large."""
    tokens = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 0.0
    tokens[0] = 0.0
    tokens[0, 0] = 15.0
    return tokens


def token_errors(*transforms: Pass) -> torch.Tensor:
    """Of each token's output over its size, at 8 bits with one static scale per input."""
    tokens = with_a_giant()
    program = qc.capture(Feed(), tokens)
    quantize = (QuantizeWeights("int8"), QuantizeActivations("int8", granularity="tensor"))
    context = Context(calibration=Calibration(ExampleInputs([tokens])))
    after, _ = apply(program, *transforms, *quantize, context=context)
    expected, found = program(tokens), after(tokens)
    errors: torch.Tensor = (found - expected).norm(dim=1) / expected.norm(dim=1)
    return errors


@pytest.mark.parametrize("method", ["smoothquant", "os+"])
def test_scales_before_a_rotation_save_ordinary_tokens_from_a_giant(method: str) -> None:
    rotate = (FoldNormGain(), CentreNorms(), Rotate(online=["down_proj"]))
    rotated = token_errors(*rotate)
    smooth = Smooth(method, granularity="tensor", online=["down_proj"])
    both = token_errors(smooth, *rotate)
    # Spread over all channels, the giant token leaves the others some steps of the grid.
    assert rotated[1:].median() > 0.2
    assert both[1:].median() < 0.25 * rotated[1:].median()
    assert both[0] < 0.05


def test_gains_that_a_rotation_folds_are_left_alone() -> None:
    _, result = apply(tiny("llama"), Smooth(strength=0.5, online=["down_proj"]))
    assert {d["sinks"][0].split(".")[-2] for d in result.details} == {"o_proj", "down_proj"}  # type: ignore[index]
    assert "rotating folds the gain in front of it" in {skip.reason for skip in result.skips}


def test_errors_count_by_the_size_of_their_token() -> None:
    output = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 2.0], [0.0, 2.0], [0.0, 0.0]])
    # Outputs below the median, 2, count as if they were of that size.
    assert row_energies(output).tolist() == [25.0, 4.0, 4.0, 4.0, 4.0]
