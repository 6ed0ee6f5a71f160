"""Named recipes that divide weights: text from a tiny model, and the same logits everywhere."""

import numpy as np
import pytest

import qcompile as qc

IDS = np.array([[1, 9, 200, 31, 7, 55, 120, 3]])
TEXT = ["It was a bright cold day in April, and the clocks were striking thirteen. " * 20]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return tiny_checkpoint("llama", hidden_size=128, intermediate_size=192, head_dim=32)


def made(model, recipe, target, folder):
    return qc.compile(
        model,
        recipe,
        target=target,
        output=folder / target,
        calibration=TEXT,
        calibration_samples=4,
        calibration_length=64,
        work_dir=folder / "work",
        check="off",
    )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w3-owq", "w4-adpq", "w3-mixed", "w2-slim"])
def test_targets_agree_and_write_text(model, tmp_path, recipe):
    on_cpu, on_onnx = (made(model, recipe, target, tmp_path) for target in ("cpu", "onnx"))
    # Float32 sums in another order, over two layers.
    np.testing.assert_allclose(on_cpu.forward(IDS), on_onnx.forward(IDS), rtol=1e-4, atol=1e-4)
    for artifact in (on_cpu, on_onnx):
        assert len(list(artifact.generate("ab", max_new_tokens=4, stream=True))) > 0


@pytest.mark.slow
def test_rounded_activations_agree_as_far_as_ties_allow(model, tmp_path):
    logits = [made(model, "w4a8-quik", t, tmp_path).forward(IDS) for t in ("cpu", "onnx")]
    difference = np.abs(logits[0] - logits[1]) / np.abs(logits[1]).max()
    # An activation on the boundary of two codes may fall on either side: 1/127 of a token's range.
    assert difference.max() < 3e-2
    assert np.median(difference) < 1e-5
