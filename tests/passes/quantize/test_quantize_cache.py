"""Caches get formats, and programs compute with what caches keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile.analysis.cost import CostModel, Sizes
from qcompile.analysis.sites import find_sites
from qcompile.errors import RecipeError
from qcompile.frontends.huggingface import capture_model
from qcompile.ir import dialect
from qcompile.ir.caches import CacheFormat, cache_format
from qcompile.ir.program import Program
from qcompile.kernels.kv_append.rows import decode_rows, encode_rows
from qcompile.passes.infra import PassManager, run_passes
from qcompile.passes.quantize.quantize_cache import QuantizeCache
from qcompile.pipeline import front_phases
from qcompile.recipe import load_recipe

WIDTH = 8  # of a head


@pytest.fixture(scope="module")
def program(tiny_checkpoint: Any) -> Program:
    transformers = pytest.importorskip("transformers")
    directory: Path = tiny_checkpoint("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    return PassManager(front_phases()).run(capture_model(model))[0]


def formats(program: Program) -> list[CacheFormat]:
    return [cache_format(append) for append in program.calls(dialect.kv_append)]


def test_every_cache_gets_the_format(program: Program) -> None:
    (record,) = PassManager([QuantizeCache("int4", group_size=4)]).run(program)[1]
    after = run_passes(program, [QuantizeCache("int4", group_size=4)])
    assert formats(program) == [CacheFormat()] * 4
    assert formats(after) == [CacheFormat("int4", 4)] * 4
    assert "qc.kv_append(%past_key_values.0.key, " in after.text()
    assert after.text().count(", int4, 4)") == 4
    # Half a byte a number, and three bytes for each group of four.
    assert [d["bits_per_value"] for d in record.result.details] == [4 + 6] * 4
    assert [d["layer"] for d in record.result.details] == [0, 0, 1, 1]


def test_keys_and_values_may_differ(program: Program) -> None:
    after = run_passes(program, [QuantizeCache("int8", values="int4")])
    assert [f.name for f in formats(after)] == ["int8", "int4"] * 2
    only_keys = run_passes(program, [QuantizeCache("bf16", values="float")])
    assert [f.name for f in formats(only_keys)] == ["bf16", "float"] * 2


def test_groups_wider_than_a_head_are_the_head(program: Program) -> None:
    after = run_passes(program, [QuantizeCache("int8", group_size=128)])
    assert formats(after) == [CacheFormat("int8", 0)] * 4


def test_programs_compute_with_what_the_cache_keeps(program: Program) -> None:
    ids = torch.arange(10).reshape(2, 5)
    exact = program(ids)
    rounded = run_passes(program, [QuantizeCache("int8")])(ids)
    # Keys and values of the first layer do not depend on any cache.
    for before, after in zip(exact.past_key_values[:2], rounded.past_key_values[:2], strict=True):
        kept = decode_rows(encode_rows(before, "int8", 0), "int8", 0, before.shape[-1])
        assert torch.equal(after, kept)
    error = (rounded.logits - exact.logits).norm() / exact.logits.norm()
    assert 1e-5 < error < 0.02
    coarse = run_passes(program, [QuantizeCache("int4")])(ids).logits
    assert (coarse - exact.logits).norm() > 4 * (rounded.logits - exact.logits).norm()


def test_decoding_continues_a_prompt(program: Program) -> None:
    after = run_passes(program, [QuantizeCache("int4", group_size=4)])
    ids = torch.arange(12).reshape(2, 6)
    whole = after(ids)
    start = after(ids[:, :4])
    rest = after(ids[:, 4:], past_key_values=start.past_key_values)
    torch.testing.assert_close(rest.logits, whole.logits[:, 4:], rtol=0, atol=1e-5)


def test_cost_counts_the_bytes_that_are_kept(program: Program) -> None:
    sizes = Sizes(batch=2, query=1, past=99)
    full = CostModel(program, sizes).total(program).cache_bytes
    after = run_passes(program, [QuantizeCache("int8")])
    width = int(next(program.calls(dialect.kv_append)).meta["val"].shape[-1])
    # A byte a number and three for the scale, instead of four bytes a number.
    assert CostModel(after, sizes).total(after).cache_bytes * 4 * width == full * (width + 3)


def test_no_transform_passes_a_cache_that_rounds(program: Program) -> None:
    after = run_passes(program, [QuantizeCache("int8")])
    reasons = [blocker.reason for site in find_sites(after) for blocker in site.blockers]
    assert "the cache rounds it to int8" in reasons


def test_models_without_a_cache_are_passed_over(linear: Program) -> None:
    import dataclasses

    from qcompile.ir.types import Fact

    without = dataclasses.replace(linear, facts=linear.facts | {Fact.CACHE_OWNED})
    (record,) = PassManager([QuantizeCache()]).run(without)[1]
    assert [skip.reason for skip in record.result.skips] == ["the model keeps no cache"]


@pytest.mark.parametrize("options", [{"format": "int3"}, {"keys": "fp8"}, {"group_size": -1}])
def test_unknown_choices_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        QuantizeCache(**options)


def test_transforms_may_not_follow() -> None:
    with pytest.raises(RecipeError, match="rotate comes after quantize_cache"):
        load_recipe({"steps": [{"quantize_cache": {"format": "int8"}}, "rotate"]})
