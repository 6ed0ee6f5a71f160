"""Caches of few bits become bytes at the edges of a program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import qcompile as qc
from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.ir.types import Role
from qcompile.passes.infra import run_passes
from qcompile.passes.lower.store_caches import StoreCaches
from qcompile.passes.quantize.quantize_cache import QuantizeCache

if TYPE_CHECKING:
    from tests.conftest import TinyCheckpoint


@pytest.fixture(scope="module")
def program(tiny_checkpoint: TinyCheckpoint) -> Program:
    return qc.capture(tiny_checkpoint("llama"))


def test_inputs_and_outputs_of_caches_become_rows(program: Program) -> None:
    after = run_passes(program, [QuantizeCache("int4", group_size=4), StoreCaches()])
    after.verify(shapes=True)
    ports = zip(after.inputs, after.signature.inputs, strict=True)
    caches = [node for node, port in ports if port.role in (Role.PAST_KEY, Role.PAST_VALUE)]
    caches += after.results[1:]
    assert len(caches) == 8
    for node in caches:
        assert node.meta["val"].dtype == torch.uint8
        assert node.meta["val"].shape[-1] == 4 + 2 * 3  # nibbles; two scales and zero points
    assert "int4, 4, 8)" in after.text()  # kv_decode to heads of 8
    assert all(len(append.args) == 2 for append in after.calls(dialect.kv_append))


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_the_program_computes_the_same(program: Program, format: str) -> None:
    rounded = run_passes(program, [QuantizeCache(format)])
    stored = run_passes(rounded, [StoreCaches()])
    ids = torch.arange(14).reshape(2, 7)
    expected, found = rounded(ids[:, :4]), stored(ids[:, :4])
    assert torch.equal(found.logits, expected.logits)
    assert found.past_key_values[0].dtype == torch.uint8
    again = stored(ids[:, 4:], past_key_values=found.past_key_values)
    wanted = rounded(ids[:, 4:], past_key_values=expected.past_key_values)
    assert torch.equal(again.logits, wanted.logits)


def test_float_caches_stay(program: Program) -> None:
    mixed = run_passes(program, [QuantizeCache("int8", keys="float"), StoreCaches()])
    dtypes = [node.meta["val"].dtype for node in mixed.results[1:]]
    assert dtypes == [torch.float32, torch.uint8] * 2
    assert run_passes(program, [StoreCaches()]).text() == program.text()
