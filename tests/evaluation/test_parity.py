"""All targets against the one program that they are lowered from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qcompile as qc
from qcompile.artifact import load
from qcompile.backends.registry import target_names
from qcompile.cli import main
from qcompile.cli_parity import parity_table
from qcompile.errors import DataError, RecipeError
from qcompile.evaluation.parity import Parity, TargetParity

WEIGHT_ONLY = {
    "name": "w4",
    "steps": [{"quantize_weights": {"format": "int4-g16", "embedding": "int4-g16-asym"}}],
}

BOUNDS = {"cpu": 1e-5, "onnx": 1e-5, "cuda:rounding=none": 1e-5, "cuda": 1e-2}
"""Of max |difference| over max |logit|: float32 sums in other orders; and for `cuda` by default
both operands of a product rounded to float16, 5e-4 of each, through two layers."""


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    """Two layers, with a window so that more than one mask matters."""
    return tiny_checkpoint("mistral", sliding_window=6)


@pytest.fixture(scope="module")
def compared(checkpoint: Path) -> Parity:
    return qc.parity(checkpoint, WEIGHT_ONLY, list(BOUNDS), window=12, max_tokens=36, threads=1)


def test_every_target_computes_the_program(compared: Parity) -> None:
    assert compared.positions == 36
    assert compared.noise is None
    assert {target.split(":")[0] for target in BOUNDS} == set(target_names())
    assert [row.target for row in compared.targets] == list(BOUNDS)
    for row, bound in zip(compared.targets, BOUNDS.values(), strict=True):
        assert row.reason == ""
        assert row.relative_error is not None
        assert row.relative_error < bound
        assert row.kl is not None
        assert row.kl < bound
        assert row.top1_agreement is not None
        assert row.top1_agreement >= 35 / 36
        assert row.bytes is not None
        assert row.bytes > 10_000


def test_figures_are_what_they_are_called(checkpoint: Path) -> None:
    """Measured once more, by hand: one logit of each position is moved."""
    program = qc.capture(checkpoint)
    ids = np.arange(2, 26).reshape(2, 12)

    def shifted(sample: dict[str, np.ndarray]) -> torch.Tensor:
        logits = program(torch.from_numpy(sample["input_ids"])).logits.clone()
        logits[..., 0] -= 0.5
        return logits

    from qcompile.evaluation import parity

    samples = [{"input_ids": row[None]} for row in ids]
    reference = parity._Reference(program, samples)
    row = parity._measure("cpu", shifted, reference)
    vocabulary = reference.outputs[0].shape[-1]
    assert row.max_error == pytest.approx(0.5, abs=1e-6)
    assert row.mean_error == pytest.approx(0.5 / vocabulary, rel=1e-5)
    largest = max(float(output.abs().max()) for output in reference.outputs)
    assert row.relative_error == pytest.approx(0.5 / largest, rel=1e-5)
    expected = torch.cat([output[0] for output in reference.outputs]).double()
    moved = expected.clone()
    moved[:, 0] -= 0.5
    kl = (expected.softmax(-1) * (expected.log_softmax(-1) - moved.log_softmax(-1))).sum(-1).mean()
    assert row.kl == pytest.approx(float(kl), abs=1e-5)


@pytest.mark.parametrize("recipe", ["w8a8-rtn", "w8a8-fp8"])
def test_rounded_activations_are_compared_with_the_noise_of_rounding(
    recipe: str, checkpoint: Path
) -> None:
    """A value that falls to the other side of an edge changes by 1/127 of the largest beside it,
    or by an eighth of itself, and logits by some hundredths: the noise is there, and the
    predictions stay what they are.
    """
    result = qc.parity(checkpoint, recipe, ["onnx"], window=12, max_tokens=36, threads=1)
    (row,) = result.targets
    noise = result.noise
    assert noise is not None
    assert noise.max_error is not None
    assert noise.max_error > 0
    for figures in (row, noise):
        assert figures.kl is not None
        assert figures.kl < 1e-2
    assert parity_table(result).rows[-1][0] == "program in float64"


def test_target_that_refuses_says_why_and_the_others_run(checkpoint: Path) -> None:
    recipe = {"name": "odd", "steps": [{"quantize_weights": {"format": "int4-g12"}}]}
    result = qc.parity(
        checkpoint, recipe, ["cpu", "cuda:rounding=none"], window=8, max_tokens=8, threads=1
    )
    refused, ran = result.targets
    assert "groups of a multiple of 16" in refused.reason
    assert "and 14 more" in refused.reason
    assert refused.max_error is None
    assert ran.reason == ""
    assert ran.max_error is not None


def test_module_is_compared_on_its_example_inputs() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3))
    result = qc.parity(
        module, "w8-rtn", ["cpu", "onnx"], example_inputs=torch.randn(4, 32), threads=1
    )
    assert result.positions == 4
    for row in result.targets:
        assert row.reason == ""
        assert row.kl is None
        assert row.relative_error is not None
        assert row.relative_error < 1e-5


def test_recipe_that_looks_at_activations_is_calibrated_first(checkpoint: Path) -> None:
    result = qc.parity(
        checkpoint,
        "w4-gptq",
        ["onnx"],
        calibration_samples=2,
        calibration_length=16,
        window=8,
        max_tokens=8,
        threads=1,
    )
    (row,) = result.targets
    assert row.reason == ""
    assert row.relative_error is not None
    assert row.relative_error < 1e-5


def test_module_without_inputs_is_refused() -> None:
    program = qc.capture(nn.Linear(3, 2), torch.randn(4, 3))
    with pytest.raises(DataError, match="nothing to compare it on"):
        qc.parity(program)


def test_unknown_target_is_refused_before_any_work() -> None:
    with pytest.raises(RecipeError, match="unknown target 'onxx'"):
        qc.parity("no such model", targets=["onxx"])


def test_command_prints_a_row_per_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    rows = (
        TargetParity("cpu", "", "ONNX Runtime", 2e-6, 1e-7, 3e-7, 1e-9, 1.0, 5_000_000, 0.1),
        TargetParity("cuda", "it has no GPU"),
    )

    def compare(*args: Any, **options: Any) -> Parity:
        asked.append((args, options))
        return Parity("tiny", "w4", 36, rows)

    monkeypatch.setattr("qcompile.evaluation.parity.parity", compare)
    options = ["--window", "9", "--calibration", "self", "-q"]
    assert main(["parity", "tiny", "-r", "w4-rtn", "-t", "cpu, cuda", *options]) == 0
    arguments, named = asked[0]
    assert arguments == ("tiny", "w4-rtn", ["cpu", "cuda"])
    assert (named["window"], named["calibration"]) == (9, "self")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny, w4: 36 positions against the program"
    words = [" ".join(line.split()) for line in lines[2:]]
    assert words == [
        "cpu 2.0e-06 1.0e-07 1.0e-09 100.00% 5.0 MB ONNX Runtime",
        "cuda - - - - - it has no GPU",
    ]
    assert main(["parity", "tiny", "--json", "-q"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["targets"][1]["reason"] == "it has no GPU"
    assert document == Parity("tiny", "w4", 36, rows).to_dict()


def test_table_has_a_cell_for_every_column(compared: Parity) -> None:
    table = parity_table(compared)
    assert all(len(row) == len(table.header) for row in table.rows)


def test_greedy_tokens_are_the_same_on_every_target(checkpoint: Path, tmp_path: Path) -> None:
    """Decoding over a cache, and rows of different lengths, on artifacts of one program."""
    program = qc.capture(checkpoint)
    prompts = [[5, 7, 9, 11], [8]]
    found = {}
    for target in ("cpu", "onnx", "cuda:rounding=none"):
        path = tmp_path / target.partition(":")[0]
        qc.compile(program, WEIGHT_ONLY, target, path, threads=1, check="off")
        completions = load(path, threads=1).complete(prompts, max_new_tokens=12)
        found[target] = [completion.token_ids for completion in completions]
    assert len({str(tokens) for tokens in found.values()}) == 1
