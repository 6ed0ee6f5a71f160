"""Targets by name."""

from __future__ import annotations

import difflib
import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from qcompile.errors import RecipeError

if TYPE_CHECKING:
    from qcompile.backends.base import Target

TARGETS: Final = MappingProxyType(
    {
        "cpu": ("qcompile.backends.cpu.target", "CpuTarget"),
        "cuda": ("qcompile.backends.cuda.target", "CudaTarget"),
        "onnx": ("qcompile.backends.onnx.target", "OnnxTarget"),
    }
)
"""Name of a target to the module and the class that implement it."""


def target_names() -> tuple[str, ...]:
    """The targets that a program can be compiled for."""
    return tuple(TARGETS)


def get_target(name: str) -> Target:
    """A target by name; its module is imported only now.

    Raises:
        RecipeError: If there is no such target; it suggests one.
    """
    if name not in TARGETS:
        close = difflib.get_close_matches(name, TARGETS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise RecipeError(
            f"unknown target '{name}'", remedy=f"{hint}(known: {', '.join(sorted(TARGETS))})"
        )
    module, attribute = TARGETS[name]
    target: Target = getattr(importlib.import_module(module), attribute)()
    return target
