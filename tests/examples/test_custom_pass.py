"""The example of a user's own rule and pass, and the guide that teaches them, do what they say."""

from __future__ import annotations

import importlib.util
import inspect
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests.guides import assert_guide_is_true
from torch import Tensor, nn

from qcompile.frontends.torch_export import capture_module
from qcompile.passes.infra import run_passes
from qcompile.passes.rule import ApplyRules

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "custom_pass.py"
GUIDE = ROOT / "docs" / "passes.md"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("custom_pass", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_pass"] = module
    spec.loader.exec_module(module)
    return module


def test_script_prints_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    before, after = printed.split("after:\n")
    assert before.count("aten.mul") == 2
    assert "aten.mul" not in after
    assert "aten.linear(%1, @down.weight.scaled, @down.bias.scaled)" in after
    assert "merge_scales: 1 rewrites\nfold_scale: 1 rewrites\n" in after
    error = re.search(r"relative difference: (\S+)", after)
    assert error is not None
    # The factor 1/8 only moves exponents; what remains is the rounding of the addition.
    assert float(error[1]) <= 1e-6


@pytest.mark.parametrize("name", ["MergeScales", "FoldScale"])
def test_rule_and_pass_have_fewer_than_thirty_lines(example: ModuleType, name: str) -> None:
    assert len(inspect.getsource(getattr(example, name)).splitlines()) < 30


def test_pass_leaves_layers_that_are_used_elsewhere(example: ModuleType) -> None:
    class TwoUses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            branch: Tensor = self.layer(x)
            return branch + 0.5 * branch

    program = capture_module(TwoUses(), torch.randn(4, 8))
    program.facts |= example.FoldScale.requires
    after = run_passes(program, [ApplyRules([example.MergeScales()]), example.FoldScale()])
    assert after.text() == program.text()


def test_guide_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    assert_guide_is_true(GUIDE, capsys)
