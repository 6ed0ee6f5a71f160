"""Weights of every width that the kernels read: compiled models against their programs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch

from qcompile.artifact import Artifact
from qcompile.compiler import compile
from qcompile.ir.program import Program
from qcompile.kernels.cpu.layout import PACKABLE_BITS
from qcompile.passes.infra import PassManager
from qcompile.pipeline import recipe_phases
from qcompile.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from tests.backends.cpu.conftest import Models

EXACT = 1e-5
"""Bound on max |difference| / max |logit|: both sides decode the same codes and scales, and sum the
same float32 products in other orders, some 1e-6 of their terms in each of two layers."""

GROUP = 16

Compiled = Callable[[str], tuple[Program, Artifact]]


def weight_only(format: str) -> Recipe:
    """All weights in one format: linear layers, the embedding and the tied output."""
    step = {"format": format, "method": "rtn", "embedding": format, "lm_head": format}
    return load_recipe({"name": "widths", "steps": [{"quantize_weights": step}]})


@pytest.fixture(scope="module")
def compiled(program: Models, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """A tiny Llama with tied embeddings in a format: quantized, and compiled from the same."""

    @functools.cache
    def make(format: str) -> tuple[Program, Artifact]:
        model, recipe = program("llama-tied"), weight_only(format)
        quantized = PassManager(recipe_phases(recipe)).run(model)[0]
        output = tmp_path_factory.mktemp(format) / "artifact"
        return quantized, compile(model, recipe=recipe, output=output, threads=1)

    return make


WEIGHTS = {
    "QLinear": {1: "N"},
    "QEmbedding": {1: "N"},
    "QLinears": {2: "N0", 4: "N1", 6: "N2"},
    "QGatedLinear": {2: "N", 4: "N"},
}
"""Inputs of operators that are weights, and the attributes that tell their sizes."""

INTEGERS = tuple(f"int{bits}-g{GROUP}" for bits in PACKABLE_BITS)
LOOKUPS = ("ternary-g16", "nf4-g16", "nf4-g16-dq", "fp8", "mxfp4", "nvfp4", "(-2,-0.5,0,1)-g32")
FORMATS = (
    *INTEGERS,
    "int1-g16-asym",
    "int4-g16-asym16",
    "int8-asym16",
    "int3-g16-asym",
    "int4-g16-fp32",
    *LOOKUPS,
)


@pytest.mark.parametrize("format", FORMATS)
def test_forward_equals_the_program(format: str, compiled: Compiled) -> None:
    program, artifact = compiled(format)
    for shape in ((1, 7), (3, 9)):
        ids = np.random.default_rng(0).integers(1, 260, shape)
        expected = program(torch.from_numpy(ids))[0].numpy()
        error = np.abs(artifact.forward(ids) - expected).max() / np.abs(expected).max()
        assert error <= EXACT


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_weights_take_their_bits_and_float16_scales(bits: int, compiled: Compiled) -> None:
    _, artifact = compiled(f"int{bits}-g{GROUP}")
    model = onnx.load(artifact.path / "model.onnx", load_external_data=False)
    sizes = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    expected = {}
    for node in model.graph.node:
        options = {attribute.name: attribute.i for attribute in node.attribute}
        for weight, size in WEIGHTS.get(node.op_type, {}).items():
            if weight >= len(node.input):
                continue
            rows, columns = -(-options[size] // 16) * 16, options["K"]
            assert columns % GROUP == 0
            expected[node.input[weight]] = rows * columns * bits // 8 + rows * columns // GROUP * 2
    assert len(expected) == 1 + 7 * 2  # the tied embedding, and seven layers in two blocks
    assert {name: sizes[name] for name in expected} == expected
