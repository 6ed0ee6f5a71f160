"""Blocks learned in sequence: what comes of it, from which inputs, and once only."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.passes.transform.methods import calibrated, function_error, tiny

from qcompile.calibration.journal import Journal
from qcompile.calibration.settings import Calibration
from qcompile.calibration.stream import Stream
from qcompile.errors import DataError, ModelError
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, PassManager
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.passes.tune import quantize_blocks
from qcompile.passes.tune.descent import descend

Records = dict[str, dict[str, Any]]

QUICK = {"steps": 6, "batch": 2}


@cache
def model() -> Program:
    return tiny("llama-tied")


def quantize(
    method: str,
    format: str = "int3-g16",
    *,
    journal: Journal | None = None,
    memory_limit: int | None = None,
    seed: int = 0,
    sequential: str = "block",
    options: dict[str, Any] | None = None,
) -> tuple[Program, Records]:
    """The tiny model after a method, and the record of each weight."""
    learned = method in ("signround", "omniquant")
    step = QuantizeWeights(
        format,
        method=method,
        options=(options or QUICK) if learned else {},
        sequential=sequential,  # type: ignore[arg-type]
        embedding="float",
        lm_head="float",
    )
    data = calibrated(8).calibration.data
    context = Context(calibration=Calibration(data, memory_limit, journal), seed=seed)
    after, records = PassManager([step]).run(model(), context)
    return after, {detail["weight"]: detail for detail in records[0].result.details}


def assert_same(one: Program, other: Program) -> None:
    assert set(one.weights) == set(other.weights)
    for name in one.weights:
        assert torch.equal(one.weights.materialize(name), other.weights.materialize(name)), name


def block_errors(records: Records) -> list[float]:
    return [records[name]["output_error"] for name in records if name.endswith("down_proj.weight")]


@pytest.mark.parametrize("method", ["signround", "omniquant"])
@pytest.mark.parametrize("format", ["int4", "int2-g16-asym"])
def test_blocks_come_nearer_to_the_float_model_than_by_rounding(method: str, format: str) -> None:
    longer = {"steps": 40, "batch": 2}
    _, learned = quantize(method, format, options=longer)
    _, rounded = quantize(method, format, options={"steps": 0, "batch": 4})
    assert len(block_errors(learned)) == 2
    # The second block gets other inputs in both, and so is not compared. Random weights have no
    # outliers, so that clipping and scaling can do little for them.
    much = 0.9 if method == "signround" else 0.97
    assert block_errors(learned)[0] < much * block_errors(rounded)[0]


def test_without_steps_weights_are_rounded_to_nearest() -> None:
    after, _ = quantize("signround", options={"steps": 0})
    assert_same(after, quantize("rtn")[0])


def test_scales_and_ranges_keep_the_function_but_for_rounding() -> None:
    options = {"steps": 20, "batch": 4, "scale_rate": 0.05}
    after, _ = quantize("omniquant", "int8", options=options)
    gains = [name for name in after.weights if name.endswith("input_layernorm.weight")]
    assert gains
    for name in gains:
        before = model().weights.materialize(name)
        assert not torch.equal(after.weights.materialize(name), before)
    # 8-bit codes per channel leave 0.4 % of the largest weight; wrong scales would leave 20 %.
    assert function_error(model(), after) < 0.03


def test_no_rate_for_scales_leaves_gains_as_they_are() -> None:
    after, _ = quantize("omniquant", options={**QUICK, "scale_rate": 0.0})
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(after.weights.materialize(name), model().weights.materialize(name))


def test_weights_outside_of_blocks_are_rounded_to_nearest() -> None:
    step = QuantizeWeights("int4-g16", method="signround", options=QUICK, lm_head="int8-g16")
    records = PassManager([step]).run(model(), calibrated())[1][0].result.details
    methods = {record["weight"]: record["method"] for record in records}
    assert methods["model.embed_tokens.weight"] == "rtn"
    assert methods["model.layers.0.mlp.down_proj.weight"] == "signround"
    assert sum(method == "signround" for method in methods.values()) == 14


def test_later_blocks_see_quantized_blocks_before_them_unless_told_not_to() -> None:
    (_, after_quantized), (_, after_float) = (
        quantize("signround", sequential=sequential) for sequential in ("block", "none")
    )
    assert block_errors(after_quantized)[0] == block_errors(after_float)[0]
    assert block_errors(after_quantized)[1] > block_errors(after_float)[1]


def test_activations_that_will_be_rounded_are_learned_with() -> None:
    _, float_activations = quantize("signround", "int8")
    _, rounded = quantize("signround", "int8", options={**QUICK, "activation_bits": 4})
    assert block_errors(rounded)[0] > 10 * block_errors(float_activations)[0]


def test_seed_decides_about_the_order_of_the_data() -> None:
    first = quantize("signround")[0]
    assert_same(first, quantize("signround")[0])
    other = quantize("signround", seed=1)[0]
    with pytest.raises(AssertionError):
        assert_same(first, other)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("method", ["signround", "omniquant"])
def test_threads_and_memory_limit_do_not_change_a_bit(method: str) -> None:
    torch.set_num_threads(1)
    expected, _ = quantize(method)
    torch.set_num_threads(3)
    assert_same(quantize(method, memory_limit=0)[0], expected)


@pytest.mark.parametrize("method", ["signround", "omniquant"])
def test_run_that_was_ended_goes_on_behind_the_last_finished_block(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, records = quantize(method)
    calls = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return descend(*args, **kwargs)

    monkeypatch.setattr(quantize_blocks, "descend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(method, journal=Journal(tmp_path))
    after, resumed = quantize(method, journal=Journal(tmp_path))
    assert len(calls) == 3  # of two blocks the first one was not learned again
    assert_same(after, expected)
    assert resumed == records

    def unwanted(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    for owner, name in ((quantize_blocks, "descend"), (Stream, "_run")):
        monkeypatch.setattr(owner, name, unwanted)
    again, same = quantize(method, journal=Journal(tmp_path))
    assert_same(again, expected)
    assert same == records


def test_other_seed_or_options_are_not_taken_for_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize("signround", journal=Journal(tmp_path))
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return descend(*args, **kwargs)

    monkeypatch.setattr(quantize_blocks, "descend", counted)
    quantize("signround", journal=Journal(tmp_path), seed=1)
    quantize("signround", journal=Journal(tmp_path), options={**QUICK, "rate": 0.02})
    assert len(calls) == 4


def test_missing_data_is_an_error_that_names_the_method() -> None:
    step = QuantizeWeights("int4-g16", method="signround", lm_head="float")
    with pytest.raises(DataError, match="method 'signround' needs calibration data"):
        PassManager([step]).run(model(), Context())


def test_block_that_is_not_finite_is_an_error_that_names_it() -> None:
    program = model().copy()
    gain = program.weights.materialize("model.layers.1.input_layernorm.weight")
    program.weights.put("model.layers.1.input_layernorm.weight", gain * float("inf"))
    step = QuantizeWeights("int4-g16", method="signround", options=QUICK, lm_head="float")
    with pytest.raises(ModelError, match=r"block of 'model\.layers\.1\.\w+\.\w+\.weight' is not"):
        PassManager([step]).run(program, calibrated())


@pytest.mark.parametrize(
    ("method", "architecture"),
    [
        ("omniquant", "gpt2"),
        ("omniquant", "phi3"),
        ("signround", "gemma2"),
        ("signround", "mixtral"),
    ],
)
def test_blocks_are_found_and_learned_in_other_architectures(
    method: str, architecture: str
) -> None:
    step = QuantizeWeights(
        "int4-g16", method=method, options=QUICK, lm_head="float", embedding="float"
    )
    _, records = PassManager([step]).run(tiny(architecture), calibrated())
    details = records[0].result.details
    learned = [record for record in details if record["method"] == method]
    assert len(learned) >= 6
    assert all(record["output_error"] > 0 for record in learned)
