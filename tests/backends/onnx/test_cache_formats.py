"""Caches of few bits in standard operators: the very bytes of the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qcompile as qc
from qcompile.errors import QCompileError
from qcompile.passes.infra import PassManager
from qcompile.pipeline import recipe_phases
from qcompile.recipe import load_recipe

if TYPE_CHECKING:
    from tests.conftest import TinyCheckpoint

ops = torch.ops.qc


def positions(width: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Numbers of all magnitudes that float16 scales span, subnormal ones among them, and zeros."""

    def make(n: int) -> tuple[Tensor, ...]:
        x = torch.randn(2, 3, n, width)
        magnitudes = torch.tensor([1.0, 1e-6, 3e4])
        x = x * magnitudes.reshape(1, 3, 1, 1)
        x[0, 0, 0] = 0.0
        return (x,)

    return make


def through(width: int, format: str, group_size: int) -> Callable[[Tensor], list[Tensor]]:
    def function(x: Tensor) -> list[Tensor]:
        torch._check(x.shape[-1] == width)
        rows = ops.kv_encode(x, format, group_size)
        return [rows.to(torch.int32), ops.kv_decode(rows, format, group_size, width)]

    return function


@pytest.mark.parametrize(
    ("width", "format", "group_size"),
    [(16, "int8", 0), (16, "int4", 0), (24, "int8", 16), (24, "int4", 16), (7, "int4", 0)],
)
def test_rows_are_those_of_the_reference(
    onnx: Any, width: int, format: str, group_size: int
) -> None:
    onnx.check(through(width, format, group_size), positions(width), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"format": "int8"}, {"format": "int4", "group_size": 4}])
def test_artifact_keeps_bytes_and_equals_the_program(
    options: dict[str, Any], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("llama")
    recipe = load_recipe({"steps": [{"quantize_cache": options}]})
    compiled = qc.compile(checkpoint, recipe, "onnx", tmp_path / "artifact")
    caches = compiled.manifest.signature.cache_pairs()
    assert {value.dtype for pair in caches for value in pair} == {"uint8"}
    program = PassManager(recipe_phases(recipe)).run(qc.capture(checkpoint))[0]
    ids, mask = np.random.default_rng(0).integers(1, 260, (2, 14)), np.ones((2, 14), np.int64)
    mask[1, :3] = 0
    expected = program(torch.from_numpy(ids), torch.from_numpy(mask)).logits.numpy()
    decoder = compiled._session.decoder(batch=2, capacity=14)
    found = [decoder.advance(ids[:, :9], mask[:, :9]).copy()]
    found += [decoder.advance(ids[:, i : i + 1]).copy() for i in range(9, 14)]
    errors = np.abs(np.stack(found, axis=1) - expected[:, 8:]) / np.abs(expected).max()
    # Of float32 sums; some number may fall on the other side of the boundary between two codes.
    assert np.median(errors) <= 1e-5
    assert errors.max() <= 0.1


@pytest.mark.parametrize(
    ("target", "format", "instead"),
    [("onnx", "bf16", "int4 or int8"), ("cuda", "int8", "leave the step out")],
)
def test_formats_that_a_target_lacks_are_refused_by_name(
    target: str, format: str, instead: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    recipe = {"steps": [{"quantize_cache": {"format": "float", "values": format}}]}
    with pytest.raises(QCompileError, match=f"the cache of values: .* no {format} cache") as error:
        qc.compile(tiny_checkpoint("llama"), recipe, target, tmp_path / "artifact")
    assert instead in str(error.value)
    assert not (tmp_path / "artifact").exists()
