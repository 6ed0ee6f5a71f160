"""Formats for a budget: kept, better than one format for all, predicted, legal, resumable."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import qcompile as qc
from qcompile.calibration.journal import Journal
from qcompile.calibration.samples import TokenWindows
from qcompile.calibration.settings import Calibration
from qcompile.errors import RecipeError
from qcompile.formats import parse_format
from qcompile.ir.program import Program
from qcompile.legality import preflight
from qcompile.passes.infra import Context, PassManager, PassResult
from qcompile.passes.quantize.allocation import sensitivity
from qcompile.passes.quantize.allocation.probe import Probe
from qcompile.passes.quantize.allocation.quantize_to_budget import allocate, quantize_weights
from qcompile.passes.quantize.bits import count_bits
from qcompile.pipeline import recipe_phases
from qcompile.recipe import load_recipe

CANDIDATES = ("int2-g32", "int3-g32", "int4-g32", "int6-g32")
FLOAT = {"embedding": "float", "lm_head": "float"}


def quantize(
    program: Program, windows: TokenWindows, journal: Journal | None = None, **options: object
) -> tuple[Program, PassResult]:
    step = {"format": "int4-g32", "scale_search": "mse", **FLOAT, **options}
    recipe = load_recipe({"steps": [{"quantize_weights": step}]})
    context = Context(calibration=Calibration(windows, journal=journal))
    after, (record,) = PassManager(recipe_phases(recipe)).run(program, context)
    return after, record.result


def divergence(program: Program, after: Program, windows: TokenWindows) -> float:
    (inputs,) = windows.batches(program, 1024)
    return Probe(program, inputs).change_to(after).divergence


def test_the_budget_is_kept_and_nearly_used(llama: Program, windows: TokenWindows) -> None:
    after, _ = quantize(llama, windows, target_bits=3.9, candidates=CANDIDATES)
    assert 3.8 < count_bits(after).quantized <= 3.9
    assert len({tensor.format for tensor in count_bits(after).tensors}) > 2


def test_the_same_bits_in_one_format_are_worse(llama: Program, windows: TokenWindows) -> None:
    plain, _ = quantize(llama, windows, format="int3-g32")
    bits = count_bits(plain).quantized
    chosen, _ = quantize(llama, windows, target_bits=bits, candidates=CANDIDATES)
    assert count_bits(chosen).quantized <= bits
    assert divergence(llama, chosen, windows) < divergence(llama, plain, windows)


def test_prediction_stands_beside_what_was_measured(llama: Program, windows: TokenWindows) -> None:
    after, result = quantize(llama, windows, target_bits=5.0, candidates=CANDIDATES)
    (note,) = (note for note in after.notes if "formats chosen" in note)
    found = re.search(r"predicted ([\d.]+), measured ([\d.]+); perplexity: predicted", note)
    assert found is not None, note
    predicted, measured = float(found[1]), float(found[2])
    assert measured == pytest.approx(divergence(llama, after, windows), abs=1e-4)
    # Linear in squared errors as long as these are small; they are at five bits.
    assert predicted == pytest.approx(measured, rel=0.35)
    shares = [d["predicted_divergence"] for d in result.details]
    assert sum(shares) == pytest.approx(predicted, abs=1e-4)
    assert all(d["sensitivity"] > 0 for d in result.details)


def test_any_formats_can_be_candidates(llama: Program, windows: TokenWindows) -> None:
    mixed = ("int2-g32", "higgs2x64-g32", "nf4-g32", "int8", "higgs4x256-g32")
    after, _ = quantize(llama, windows, target_bits=3.6, candidates=mixed)
    assert count_bits(after).quantized <= 3.6
    assert {t.format for t in count_bits(after).tensors if t.quantized} <= set(mixed)


def test_calibrated_methods_take_the_chosen_formats(llama: Program, windows: TokenWindows) -> None:
    after, result = quantize(llama, windows, method="gptq", target_bits=3.6, candidates=CANDIDATES)
    assert {detail["method"] for detail in result.details} == {"gptq"}
    assert count_bits(after).quantized <= 3.6


def test_a_size_counts_all_weights(llama: Program, windows: TokenWindows) -> None:
    size = 70_000
    after, _ = quantize(llama, windows, target_size=size, candidates=CANDIDATES)
    assert size - 3000 < count_bits(after).bytes <= size


def test_overrides_and_ignored_weights_stay_what_they_are(
    llama: Program, windows: TokenWindows
) -> None:
    after, _ = quantize(
        llama,
        windows,
        target_bits=3.5,
        candidates=CANDIDATES,
        ignore=["*layers.0.mlp.up_proj*"],
        overrides=[{"match": "*v_proj*", "format": "int8"}],
    )
    formats = {tensor.name: tensor.format for tensor in count_bits(after).tensors}
    assert formats["model.layers.0.mlp.up_proj.weight"] == "float32"
    assert {f for name, f in formats.items() if "v_proj" in name} == {"int8"}


@contextmanager
def dies_after(count: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    noise, left = sensitivity.noise, iter(range(count))

    def counted(weight: torch.Tensor, name: str) -> torch.Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return noise(weight, name)

    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "noise", counted)
        yield


def test_measuring_goes_on_where_it_was_ended(
    llama: Program, windows: TokenWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"target_bits": 4.0, "candidates": CANDIDATES}
    whole, _ = quantize(llama, windows, **options)
    journal = Journal(tmp_path)
    with dies_after(5, monkeypatch), pytest.raises(KeyboardInterrupt):
        quantize(llama, windows, journal, **options)
    with dies_after(9, monkeypatch):  # 14 weights in all
        again, _ = quantize(llama, windows, journal, **options)
    assert again.notes == whole.notes
    assert count_bits(again) == count_bits(whole)


def test_budgets_that_nothing_fits_are_refused(llama: Program, windows: TokenWindows) -> None:
    with pytest.raises(RecipeError, match=r"1\.500 bits per weight are less than .*: 2\.5"):
        quantize(llama, windows, target_bits=1.5, candidates=CANDIDATES)


def test_allocation_gives_more_bits_to_what_is_more_sensitive() -> None:
    torch.manual_seed(0)
    weights = {name: torch.randn(16, 64) for name in "abc"}
    formats = [parse_format(name) for name in CANDIDATES]
    slopes = {"a": 1.0, "b": 30.0, "c": 1000.0}
    found = allocate(slopes, weights.__getitem__, formats, 4.0 * 3 * 16 * 64)
    widths = [found.formats[name].bits_per_weight((16, 64)) for name in "abc"]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bits": 4, "target_size": "1MB"}, "two budgets"),
        ({"candidates": ["int4"]}, "candidates without a budget"),
        ({"target_size": "much"}, "'much' is no amount of memory"),
        ({"target_bits": 4, "candidates": ["int44"]}, "1 to 8 bits"),
    ],
)
def test_contradictions_are_refused_with_the_recipe(options: dict, message: str) -> None:
    step = {"format": "int4", **options}
    with pytest.raises(RecipeError, match=message):
        load_recipe({"steps": [{"quantize_weights": step}]})


def test_planned_size_comes_near_the_budget(llama: Program) -> None:
    step = {"format": "int4-g32", "target_bits": 3.9, **FLOAT}
    found = preflight(llama, load_recipe({"steps": [{"quantize_weights": step}]}), "cpu")
    assert found.legal
    assert any("formats are chosen for a budget" in note for note in found.notes)
    linears = [layer for layer in found.layers if layer.format != "float32"]
    sizes = [layer.shape[0] * layer.shape[1] for layer in linears]
    bits = sum(layer.bits_per_weight * n for layer, n in zip(linears, sizes, strict=True))
    assert 3.7 < bits / sum(sizes) <= 3.9


def test_candidates_that_a_target_lacks_are_found_before_any_work(llama: Program) -> None:
    step = {"format": "int4-g32", "target_bits": 4, "candidates": ["int4-g32", "int3-g24"]}
    found = preflight(llama, load_recipe({"steps": [{"quantize_weights": step}]}), "cpu")
    assert any("int3-g24" in finding.reason for finding in found.findings)
    with pytest.raises(qc.QCompileError, match="int3-g24"):
        found.refuse()


def test_without_a_budget_the_pass_is_the_plain_one() -> None:
    assert type(quantize_weights("int4")).__name__ == "QuantizeWeights"
