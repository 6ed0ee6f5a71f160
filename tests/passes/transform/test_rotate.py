from __future__ import annotations

import pytest
import torch
from tests.frontends.tiny_models import CORE
from tests.passes.transform.methods import EQUIVALENT, apply, function_error, tiny

from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.passes.equivalence import checks_for
from qcompile.passes.infra import Context, PassResult
from qcompile.passes.transform.centre_norms import CentreNorms
from qcompile.passes.transform.fold_norm_gain import FoldNormGain
from qcompile.passes.transform.fuse_transforms import FuseTransforms
from qcompile.passes.transform.rotate import Rotate

EVERYWHERE = ("down_proj", "o_proj", "query_key")


def rotated(
    program: Program, rotate: Rotate, context: Context | None = None
) -> tuple[Program, PassResult]:
    return apply(program, FoldNormGain(), CentreNorms(), rotate, context=context)


@pytest.mark.parametrize("name", CORE)
def test_rotations_keep_the_function_of_every_architecture(name: str) -> None:
    before = tiny(name)
    after, result = rotated(before, Rotate(online=EVERYWHERE))
    assert result.rewrites >= 6  # values, down, output and query/key of two layers, or more
    assert function_error(before, after) < EQUIVALENT


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_rotated_caches_are_proved_over_a_past(name: str) -> None:
    # The checks run both programs over a past: keys and values in it are rotated as well.
    context = Context(checks=checks_for("full"))
    rotated(tiny(name), Rotate(online=EVERYWHERE), context)
    found = [phase.check for phase in context.phases if phase.check is not None]
    errors = [check.error for check in found if check.error is not None]
    assert errors
    assert max(errors) < EQUIVALENT


def test_streams_and_values_cost_nothing_online() -> None:
    after, result = rotated(tiny("llama"), Rotate(online=()))
    assert not list(after.calls(dialect.transform))
    assert [detail["place"] for detail in result.details].count("values") == 2
    (stream,) = [d for d in result.details if d["place"] == "residual stream"]
    assert stream["rotation"] == "a Hadamard matrix for 32 channels"


def test_online_rotation_is_one_node_right_before_its_linear() -> None:
    after, _ = rotated(tiny("llama"), Rotate("none", "none", online=("down_proj",)))
    (first, _) = after.calls(dialect.transform)
    (linear,) = first.users
    assert linear.target is torch.ops.aten.linear.default
    assert linear.args[0] is first
    assert "down_proj" in str(linear.args[1].target)  # type: ignore[union-attr]
    assert "qc.transform(%" in after.text()
    assert '"hadamard", [48, 0, 0])' in after.text() or "hadamard, [48, 0, 0])" in after.text()


def test_fusing_leaves_online_rotations_alone() -> None:
    before, _ = rotated(tiny("llama"), Rotate(online=EVERYWHERE))
    after, result = apply(before, FuseTransforms())
    assert after.text() == before.text()
    assert result.rewrites == 0
    assert {detail["parameter_bits"] for detail in result.details} == {0}


def test_stream_that_cannot_be_rotated_is_skipped_with_the_reason() -> None:
    after, result = rotated(tiny("olmo2"), Rotate(online=("down_proj",)))
    assert any("gain feeds aten.add" in skip.reason for skip in result.skips)
    assert {d["place"] for d in result.details} == {"values", "online"}
    assert function_error(tiny("olmo2"), after) < EQUIVALENT


def test_signs_depend_on_the_seed_and_on_nothing_else() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = [
        rotated(tiny("llama"), Rotate(seed=seed))[0].weights.materialize(name) for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
