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

from qcompile.calibration.samples import TokenWindows
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

METHODS = ("smoothquant", "awq", "os+")


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
    [({"method": "os"}, "unknown method 'os'"), ({"activations": "fp3"}, "activations to 'fp3'")],
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
