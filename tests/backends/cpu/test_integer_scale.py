"""Integer scales on the CPU: packed as the kernels' 8-bit scales, exact, of the predicted size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tests.backends.cpu.test_backend import INT8_ACTIVATIONS, assert_close, interpret, some_ids
from tests.passes.quantize.moe import experts

from qcompile.backends.cpu.lower import lower_phase
from qcompile.passes.infra import run_passes
from qcompile.passes.quantize.quantize_weights import QuantizeWeights

if TYPE_CHECKING:
    from tests.backends.cpu.conftest import Artifacts, QuantizedModels

RECIPE = "w4a8-integer-scale"


@pytest.mark.parametrize("model", ["llama-tied", "qwen2"])
def test_compiled_model_equals_the_program_and_generates(
    model: str, quantized: QuantizedModels, artifact: Artifacts
) -> None:
    program, compiled = quantized(model, RECIPE), artifact(model, RECIPE)
    for shape in ((1, 1), (3, 40)):
        ids = some_ids(*shape)
        assert_close(compiled.forward(ids), interpret(program, ids), INT8_ACTIVATIONS[0])
    assert compiled.generate([5, 6, 7], max_new_tokens=4)


@pytest.mark.parametrize("format", ["int4-g16-asym-intscale", "int3-g32-intscale"])
def test_lowered_weights_equal_the_decoded_ones(format: str) -> None:
    program = run_passes(experts(), [QuantizeWeights(format)])
    lowered = run_passes(program, list(lower_phase().passes))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(lowered(x), program(x), rtol=1e-6, atol=1e-6)
