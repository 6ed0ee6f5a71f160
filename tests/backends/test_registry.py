"""Targets by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qcompile.backends.onnx.target import OnnxTarget
from qcompile.backends.registry import get_target, target_names
from qcompile.errors import RecipeError, TargetError


@pytest.mark.parametrize("name", target_names())
def test_every_target_is_found_under_its_name(name: str) -> None:
    assert get_target(name).name == name


def test_unknown_target_is_refused_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="unknown target 'cpuu'") as caught:
        get_target("cpuu")
    assert caught.value.remedy is not None
    assert "did you mean 'cpu'?" in caught.value.remedy


def test_importing_the_registry_imports_no_target() -> None:
    code = "import sys, qcompile.backends.registry; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_options_follow_the_name() -> None:
    target = get_target("onnx:opset=23")
    assert isinstance(target, OnnxTarget)
    assert target.opset == 23


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("onnx:opsets=23", "has no option 'opsets'"),
        ("onnx:opset=new", "opset is 'new'"),
        ("onnx:opset", "opset is ''"),
        ("cpu:opset=23", "has no option 'opset'"),
    ],
)
def test_bad_option_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        get_target(text)


def test_value_that_a_target_cannot_have_is_refused_by_the_target() -> None:
    with pytest.raises(TargetError, match="'float8'"):
        get_target("cuda:rounding=float8")
    with pytest.raises(TargetError, match="opset 12"):
        get_target("onnx:opset=12")
