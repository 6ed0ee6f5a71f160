"""Targets by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qcompile.backends.registry import get_target, target_names
from qcompile.errors import RecipeError


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
