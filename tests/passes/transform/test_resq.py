from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.passes.transform.methods import (
    ARCHITECTURES,
    EQUIVALENT,
    apply,
    calibrated,
    function_error,
    tiny,
    values_of,
)
from torch import fx

from qcompile.errors import DataError
from qcompile.ir import dialect
from qcompile.passes.infra import Context
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.passes.transform.centre_norms import CentreNorms
from qcompile.passes.transform.fold_norm_gain import FoldNormGain
from qcompile.passes.transform.fuse_transforms import FuseTransforms
from qcompile.passes.transform.resq import Resq, principal_rotation

BARE = (FoldNormGain(), CentreNorms())
aten = torch.ops.aten


def reader(program: Any, weight: str) -> fx.Node:
    """The linear over a weight."""
    (found,) = [n for n in program.calls(aten.linear.default) if n.args[1].target == weight]
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_resq_keeps_the_function(name: str) -> None:
    before = tiny(name)
    after, _ = apply(before, *BARE, Resq(multiple=4), FuseTransforms())
    assert ".high.weight" in after.text()
    assert function_error(before, after) < EQUIVALENT


def test_high_part_holds_the_principal_components() -> None:
    after, result = apply(tiny("llama"), *BARE, Resq(multiple=4))
    stream = result.details[0]
    assert (stream["place"], stream["high"]) == ("residual stream", 4)
    low, high = (
        reader(after, f"model.layers.1.mlp.up_proj.{part}.weight").args[0]
        for part in ("low", "high")
    )
    x, y = values_of(after, low, high)
    assert (x.shape[1], y.shape[1]) == (28, 4)
    # An eighth of the channels holds more than its share, at any layer and over all of them.
    assert y.square().sum() > 1.2 * (x.square().sum() + y.square().sum()) / 8
    assert stream["variance"] > 1.2 / 8


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_keys_turn_into_their_principal_components_where_asked(name: str) -> None:
    before = tiny(name)
    after, result = apply(before, *BARE, Resq(multiple=4, query_key=True))
    assert function_error(before, after) < EQUIVALENT
    keys = [detail for detail in result.details if detail["place"] == "queries and keys"]
    assert len(keys) == len(list(after.calls(dialect.attention)))
    # One channel of eight holds more than its share.
    assert all(detail["high"] == 1 and detail["variance"] > 1.2 / 8 for detail in keys)


def test_linears_that_share_an_input_share_its_parts() -> None:
    after, _ = apply(tiny("llama"), *BARE, Resq(multiple=4))
    stem = "model.layers.0.self_attn."
    inputs = {reader(after, f"{stem}{name}_proj.low.weight").args[0] for name in "qkv"}
    assert len(inputs) == 1


def test_low_parts_of_all_heads_come_first_behind_attention() -> None:
    after, result = apply(tiny("llama"), *BARE, Resq(fraction=0.25, multiple=4))
    weight = after.weights.spec("model.layers.0.self_attn.o_proj.high.weight")
    # Four query heads of width 8, a quarter of each.
    assert weight.shape == (32, 8)
    assert {d["place"]: d["high"] for d in result.details}["values"] == 2
    assert "permutation" in after.text()


def test_bits_are_those_of_the_two_parts() -> None:
    _, result = apply(
        tiny("llama"),
        *BARE,
        Resq(multiple=4),
        QuantizeWeights("int4", overrides=[{"match": "*.high", "format": "int8"}]),
    )
    bits = {d["weight"]: (d["shape"], d["format"]) for d in result.details}
    assert bits["model.layers.0.mlp.up_proj.low.weight"] == ([48, 28], "int4")
    assert bits["model.layers.0.mlp.up_proj.high.weight"] == ([48, 4], "int8")


def test_activations_of_the_high_part_have_their_own_bits() -> None:
    overrides = [{"match": "*.high", "format": "int8"}]
    _, result = apply(
        tiny("llama"),
        *BARE,
        Resq(multiple=4),
        QuantizeWeights("int4", overrides=overrides),
        QuantizeActivations("int4", overrides=overrides),
    )
    formats = {weight: d["format"] for d in result.details for weight in d["weights"]}
    assert formats["model.layers.0.mlp.up_proj.low.weight"] == "int4"
    assert formats["model.layers.0.mlp.up_proj.high.weight"] == "int8"
    assert formats["model.layers.0.mlp.down_proj.weight"] == "int4"


def test_the_output_projection_is_rotated_but_not_split() -> None:
    after, result = apply(tiny("llama"), *BARE, Resq(multiple=4))
    assert "it makes the logits" in {skip.reason for skip in result.skips}
    assert "lm_head.low" not in after.text()


def test_too_few_channels_are_left_alone() -> None:
    _, result = apply(tiny("llama"), *BARE, Resq(multiple=32))
    assert "32 channels are too few to split" in {skip.reason for skip in result.skips}


def test_principal_rotation_separates_the_subspaces() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    rows[:, 3] += 5 * rows[:, 7]
    covariance = rows.T @ rows / 200
    rotation = principal_rotation(covariance, 3, generator)
    one = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(rotation.T @ rotation, one, rtol=0, atol=1e-12)
    turned = rotation.T @ covariance @ rotation
    torch.testing.assert_close(turned[:9, 9:], torch.zeros(9, 3).double(), rtol=0, atol=1e-12)
    largest = torch.linalg.eigvalsh(covariance)[-3:].sum()
    torch.testing.assert_close(turned[9:, 9:].trace(), largest)


def test_resq_without_calibration_data_says_so() -> None:
    with pytest.raises(DataError, match="ResQ needs calibration data"):
        apply(tiny("llama"), *BARE, Resq(multiple=4), context=Context())


def test_same_seed_gives_the_same_basis() -> None:
    programs = [
        apply(tiny("llama"), *BARE, Resq(multiple=4), context=calibrated())[0] for _ in range(2)
    ]
    name = "model.layers.1.mlp.up_proj.high.weight"
    assert torch.equal(*(program.weights.materialize(name) for program in programs))
