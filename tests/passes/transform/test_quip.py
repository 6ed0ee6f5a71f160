from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.passes.transform.methods import (
    ARCHITECTURES,
    EQUIVALENT,
    apply,
    function_error,
    tiny,
    with_outliers,
)

from qcompile.errors import DataError, RecipeError
from qcompile.ir import dialect
from qcompile.passes.infra import Context
from qcompile.passes.transform.fuse_transforms import FuseTransforms
from qcompile.passes.transform.quip import Quip, incoherence, random_kronecker

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("rotation", ["hadamard", "kronecker"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quip_keeps_the_function(name: str, rotation: Any) -> None:
    before = tiny(name)
    after, result = apply(before, Quip(rotation), FuseTransforms())
    assert len(list(after.calls(dialect.transform))) > len(result.details) / 2
    assert function_error(before, after) < EQUIVALENT


@pytest.mark.parametrize("rotation", ["hadamard", "kronecker"])
def test_weights_with_outliers_become_incoherent(rotation: Any) -> None:
    program = with_outliers(tiny("llama"), UP, [4, 11], 50.0)
    _, result = apply(program, Quip(rotation))
    found = {detail["weight"]: detail for detail in result.details}[UP]
    # Two of 48 rows hold all of the weight: max / rms is several times that of a Gaussian, which
    # rotations on both sides make of any matrix.
    assert found["incoherence_before"] > 10
    assert found["incoherence_after"] < 6


def test_linears_that_share_an_input_share_one_transform_before_them() -> None:
    after, _ = apply(tiny("llama"), Quip(rescale=False), FuseTransforms())
    # Per layer: inputs of q/k/v, o, gate/up, down; and seven outputs.
    assert len(list(after.calls(dialect.transform))) == 2 * (4 + 7)


def test_only_scaling_takes_calibration_data() -> None:
    apply(tiny("llama"), Quip(rescale=False), context=Context())
    with pytest.raises(DataError, match="QuIP needs calibration data"):
        apply(tiny("llama"), Quip(), context=Context())


def test_what_is_ignored_and_what_makes_the_logits_stays() -> None:
    program = tiny("llama")
    after, result = apply(program, Quip(rescale=False, ignore=["*.mlp.*"]))
    reasons = {skip.node: skip.reason for skip in result.skips}
    assert reasons["lm_head.weight"] == "it makes the logits"
    assert reasons[UP] == "its input is kept by the recipe"
    assert torch.equal(after.weights.materialize(UP), program.weights.materialize(UP))


def test_unknown_rotation_is_refused() -> None:
    with pytest.raises(RecipeError, match="knows no rotation 'dense'"):
        Quip("dense")  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [7, 12, 64])
def test_random_kronecker_is_orthogonal_and_mixes_all_channels(n: int) -> None:
    matrix = random_kronecker(n, torch.Generator().manual_seed(0)).matrix()
    one = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, one, rtol=0, atol=1e-13)
    assert (matrix != 0).all()


def test_incoherence_is_one_for_equal_magnitudes_and_largest_for_one_entry() -> None:
    assert incoherence(torch.tensor([[1.0, -1.0], [1.0, 1.0]])) == pytest.approx(1)
    assert incoherence(torch.tensor([[0.0, 3.0], [0.0, 0.0]])) == pytest.approx(2)
    assert incoherence(torch.zeros(2, 2)) == 1
