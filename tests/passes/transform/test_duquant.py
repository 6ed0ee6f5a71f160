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

from qcompile.errors import DataError
from qcompile.ir import dialect
from qcompile.passes.infra import Context
from qcompile.passes.transform.duquant import Duquant
from qcompile.passes.transform.fuse_transforms import FuseTransforms
from qcompile.passes.transform.greedy_rotation import greedy_rotation, spreading_rotation, zigzag
from qcompile.passes.transform.peak_rows import unit_rows
from qcompile.passes.transform.values import Hadamard

GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_duquant_keeps_the_function(name: str) -> None:
    before = tiny(name)
    after, result = apply(before, Duquant(block_size=8, steps=8), FuseTransforms())
    assert len(result.details) == len(list(after.calls(dialect.transform))) > 0
    assert function_error(before, after) < EQUIVALENT


def test_linears_that_share_an_input_share_one_transform() -> None:
    after, result = apply(tiny("llama"), Duquant(block_size=8, steps=4))
    inputs = {tuple(detail["weights"]) for detail in result.details}
    assert (GATE, UP) in inputs
    assert (DOWN,) in inputs
    assert {skip.node: skip.reason for skip in result.skips} == {
        "lm_head.weight": "it makes the logits"
    }
    assert "compose+matrix+permutation+matrix" in after.text()


def test_blocks_are_as_large_as_divides_the_channels() -> None:
    _, result = apply(tiny("llama"), Duquant(block_size=20, steps=1))
    # 32 channels of the residual stream, 48 of the hidden layer.
    sizes = {detail["weights"][0]: detail["block_size"] for detail in result.details}
    assert (sizes[GATE], sizes[DOWN]) == (16, 16)


def test_largest_magnitude_falls_where_channels_stand_out() -> None:
    program = with_outliers(tiny("llama"), UP, [5, 17], 100.0)
    after, result = apply(program, Duquant(block_size=16, steps=32))
    (detail,) = [detail for detail in result.details if detail["weights"] == [DOWN]]
    assert detail["largest_after"] < 0.6 * detail["largest_before"]
    (node,) = [n for n in after.calls(dialect.transform) if n.args[1][0].target.startswith(DOWN)]
    (x,) = values_of(after, node.args[0])
    (rotated,) = values_of(after, node)
    assert rotated.abs().max() < 0.6 * x.abs().max()


def test_tokens_peak_lower_than_behind_hadamard_matrices_on_the_same_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(128, 256, generator=generator)
    rows[:, 3:11] *= 100
    rows = unit_rows(rows)
    peaks = {
        "duquant": Duquant(block_size=64).fit(rows, generator).apply(rows).abs().amax(1),
        "hadamard": Hadamard(256, 64).apply(rows).abs().amax(1),
    }
    # All outliers are in one block, and stay there without the permutation: in a quarter of the
    # channels, so that squares are four times as large.
    assert peaks["duquant"].square().mean() < 0.6 * peaks["hadamard"].square().mean()
    assert peaks["duquant"].max() < peaks["hadamard"].max()


def test_what_is_ignored_keeps_its_input() -> None:
    _, result = apply(tiny("llama"), Duquant(block_size=8, steps=1, ignore=["*.mlp.*"]))
    named = {name for detail in result.details for name in detail["weights"]}
    assert not any("mlp" in name for name in named)
    assert any("q_proj" in name for name in named)
    assert "its input is kept by the recipe" in {skip.reason for skip in result.skips}


def test_duquant_without_calibration_data_says_so() -> None:
    with pytest.raises(DataError, match="DuQuant needs calibration data"):
        apply(tiny("llama"), Duquant(), context=Context())


def test_same_seed_gives_the_same_transforms() -> None:
    texts = [apply(tiny("llama"), Duquant(8, 4))[0] for _ in range(2)]
    names = [name for name in texts[0].weights if ".transform" in name]
    assert names
    for name in names:
        assert torch.equal(*(p.weights.materialize(name) for p in texts))
    other, _ = apply(tiny("llama"), Duquant(8, 4, seed=1), context=calibrated())
    assert not torch.equal(
        other.weights.materialize(names[0]), texts[0].weights.materialize(names[0])
    )


def test_greedy_rotation_spreads_one_channel_evenly() -> None:
    rows = torch.zeros(5, 32)
    rows[2, 19] = 8.0
    rotation = greedy_rotation(rows, 16, 1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16, dtype=torch.float64))
    # Channel 19 is the fourth of its block: 8 / sqrt(16) in every channel.
    assert torch.allclose(
        (rows.double().reshape(-1, 16) @ rotation).abs().max(), torch.tensor(2.0).double()
    )


def test_greedy_rotation_that_helps_nothing_is_the_identity() -> None:
    rows = torch.ones(1, 4)
    rotation = greedy_rotation(rows, 4, 3, torch.Generator().manual_seed(0))
    assert torch.equal(rotation, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 9, 64])
def test_spreading_rotation_is_orthogonal_with_a_uniform_first_row(n: int) -> None:
    matrix = spreading_rotation(n, torch.Generator().manual_seed(0))
    one = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, one, rtol=0, atol=1e-14)
    torch.testing.assert_close(matrix[0], torch.full((n,), n**-0.5, dtype=torch.float64))


def test_zigzag_deals_back_and_forth() -> None:
    magnitude = torch.tensor([1.0, 8.0, 3.0, 6.0, 5.0, 4.0, 7.0, 2.0])
    dealt = magnitude[zigzag(magnitude, 2)]
    assert dealt.tolist() == [8.0, 5.0, 4.0, 1.0, 7.0, 6.0, 3.0, 2.0]
