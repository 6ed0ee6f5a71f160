from __future__ import annotations

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
    with_outliers,
)

from qcompile.errors import DataError, RecipeError
from qcompile.ir import dialect
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.passes.infra import Context
from qcompile.passes.quantize.activation_formats import IntegerActivations
from qcompile.passes.quantize.quantize_clusters import QuantizeClusters
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.passes.transform.clusters import cluster_channels, cluster_grids
from qcompile.passes.transform.fuse_transforms import FuseTransforms
from qcompile.passes.transform.rptq import Rptq

UP, DOWN, OUT = (
    f"model.layers.0.{name}_proj.weight" for name in ("mlp.up", "mlp.down", "self_attn.o")
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rptq_keeps_the_function(name: str) -> None:
    before = tiny(name)
    after, _ = apply(before, Rptq(clusters=5, head_clusters=2), FuseTransforms())
    assert function_error(before, after) < EQUIVALENT


def test_only_inputs_behind_norms_take_a_node() -> None:
    after, result = apply(tiny("llama"), Rptq(clusters=5, head_clusters=2))
    absorbed = {name: d["absorbed"] for d in result.details for name in d["weights"]}
    assert absorbed[DOWN]
    assert absorbed[OUT]
    assert not absorbed[UP]
    assert [n.args[2] for n in after.calls(dialect.transform)] == ["permutation"] * 4


def test_clusters_cover_inputs_and_stay_within_heads() -> None:
    _, result = apply(tiny("llama"), Rptq(clusters=5, head_clusters=2))
    clusters = {name: d["clusters"] for d in result.details for name in d["weights"]}
    assert sum(clusters[DOWN]) == 48
    assert len(clusters[DOWN]) <= 5
    # Four query heads of width 8 share the orders of two key heads.
    first, second = (
        clusters[OUT][: len(clusters[OUT]) // 2],
        clusters[OUT][-len(clusters[OUT]) // 2 :],
    )
    assert sum(first) == sum(second) == 16


def test_channels_that_stand_out_are_side_by_side() -> None:
    program = with_outliers(tiny("llama"), UP, [5, 17, 40], 100.0)
    after, result = apply(program, Rptq(clusters=4))
    (node,) = [
        n.args[0] for n in after.calls(torch.ops.aten.linear.default) if n.args[1].target == DOWN
    ]
    (x,) = values_of(after, node)
    (detail,) = [d for d in result.details if d["weights"] == [DOWN]]
    peaks = torch.stack([part.abs().max() for part in x.split(detail["clusters"], dim=1)])
    assert len(peaks) == 4
    # The 45 ordinary channels are in clusters of their own, far below the others.
    assert peaks.max() > 20 * peaks.min()


def quantized_error(program: Program, *passes: object) -> float:
    """Relative error of the logits, all activations rounded by clusters."""
    after, _ = apply(program, *passes, QuantizeWeights("int8"), QuantizeClusters("int5"))  # type: ignore[arg-type]
    data = calibrated().calibration.inputs(program, "a test")
    (batch,) = data.batches(program, 1 << 20)
    expected, found = (Interpreter(p).run(*batch)[0] for p in (program, after))
    return float((found - expected).norm() / expected.norm())


def test_grids_per_cluster_lose_less_than_one_grid() -> None:
    # The same function as without them: what reads the outliers is divided by as much.
    program = tiny("llama")
    for layer in range(2):
        up, down = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("up", "down"))
        program = with_outliers(program, up, [5, 17, 40], 100.0)
        program = with_outliers(program, down, [5, 17, 40], 0.01, axis=1)
    assert quantized_error(program, Rptq(clusters=8)) < 0.5 * quantized_error(program)


def test_rounded_inputs_tell_their_clusters() -> None:
    after, result = apply(
        tiny("llama"),
        Rptq(clusters=5),
        QuantizeWeights("int4"),
        QuantizeClusters("int8", ["lm_head"]),
    )
    (detail,) = [d for d in result.details if d["weights"] == [DOWN]]
    scale = after.weights.materialize("model.layers.0.mlp.down_proj.input_scale")
    assert scale.unique_consecutive().numel() == len(detail["clusters"])
    assert [skip.reason for skip in result.skips] == ["its input is kept float by the recipe"]


def test_rptq_without_calibration_data_says_so() -> None:
    with pytest.raises(DataError, match="RPTQ needs calibration data"):
        apply(tiny("llama"), Rptq(), context=Context())


def test_unknown_format_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot be 'int9'"):
        QuantizeClusters("int9")


def test_clusters_are_side_by_side_and_narrow_ones_first() -> None:
    low = torch.tensor([-1.0, -50.0, -1.1, -9.0, -51.0, -0.9])
    order, sizes = cluster_channels(low, -low, 3)
    assert sizes == [3, 1, 2]
    assert [sorted(part.tolist()) for part in order.split(sizes)] == [[0, 2, 5], [3], [1, 4]]


def test_grids_span_what_was_seen_and_zero() -> None:
    low, high = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([3.0, 15.0, 0.0])
    grid = cluster_grids(low, high, [2, 1], IntegerActivations(4, symmetric=False))
    torch.testing.assert_close(grid.scale, torch.tensor([1.0, 1.0, 0.2]))
    assert grid.zero_point is not None
    assert grid.zero_point.tolist() == [0, 0, 15]
