"""Targets by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

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


def get_target(text: str) -> Target:
    """A target by name; its module is imported only now.

    Args:
        text: The name, and after it options as the class of the target takes them, each behind a
            colon: ``"cpu"``, ``"cuda:rounding=bfloat16"``, ``"onnx:opset=23:batch=1"``.

    Raises:
        RecipeError: If there is no such target or option; it suggests one.
        TargetError: If an option cannot have the value.
    """
    name, *options = text.split(":")
    if name not in TARGETS:
        close = difflib.get_close_matches(name, TARGETS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise RecipeError(
            f"unknown target '{name}'", remedy=f"{hint}known: {', '.join(sorted(TARGETS))}"
        )
    module, attribute = TARGETS[name]
    target: type[Target] = getattr(importlib.import_module(module), attribute)
    return target(**_options(name, target, options))


def _options(name: str, target: type[Target], texts: list[str]) -> dict[str, Any]:
    """Options by name, in the types that the target's class declares."""
    parameters = inspect.signature(target).parameters
    options: dict[str, Any] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise RecipeError(
                f"the target '{name}' has no option '{key}'", remedy=f"its options: {known}"
            )
        is_text = str(parameters[key].annotation).startswith("str")
        if not is_text and not value.isdecimal():
            raise RecipeError(
                f"target '{name}': {key} is '{value}'", remedy=f"write a number: {key}=1"
            )
        options[key] = value if is_text else int(value)
    return options
