"""Ways to choose the codes of weights, each in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qcompile.errors import RecipeError, suggest
from qcompile.passes.quantize.methods.adpq import Adpq
from qcompile.passes.quantize.methods.awq_clip import AwqClip
from qcompile.passes.quantize.methods.base import Method, Outcome, Task
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.hqq import Hqq
from qcompile.passes.quantize.methods.llm_fp4 import LlmFp4
from qcompile.passes.quantize.methods.magr import Magr
from qcompile.passes.quantize.methods.mixed import Mixed
from qcompile.passes.quantize.methods.omniquant import OmniQuant
from qcompile.passes.quantize.methods.owq import Owq
from qcompile.passes.quantize.methods.quik import Quik
from qcompile.passes.quantize.methods.rtn import Rtn
from qcompile.passes.quantize.methods.signround import SignRound
from qcompile.passes.quantize.methods.slim import Slim

__all__ = ["METHODS", "Method", "Outcome", "Rtn", "Task", "make_method", "method_options"]

METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {
        "rtn": Rtn,
        "gptq": Gptq,
        "hqq": Hqq,
        "magr": Magr,
        "awq_clip": AwqClip,
        "llm_fp4": LlmFp4,
        "owq": Owq,
        "quik": Quik,
        "adpq": Adpq,
        "mixed": Mixed,
        "slim": Slim,
        "signround": SignRound,
        "omniquant": OmniQuant,
    }
)
"""Every method by the name that recipes use."""


def method_options(name: str) -> tuple[str, ...]:
    """The names of a method's options."""
    # The base of all methods is none itself, so that mypy cannot know that they are dataclasses.
    return tuple(field.name for field in fields(METHODS[name]))  # type: ignore[arg-type]


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """A method from the words of a recipe.

    Args:
        name: A key of `METHODS`.
        options: Values for its options; the others have their defaults.

    Raises:
        RecipeError: There is no such method or option, or a value is of the wrong kind.
    """
    if name not in METHODS:
        raise RecipeError(f"unknown method '{name}'", remedy=suggest(name, METHODS))
    known = method_options(name)
    for option in options or {}:
        if option not in known:
            remedy = suggest(option, known) if known else "leave the options out"
            raise RecipeError(f"method '{name}' has no option '{option}'", remedy=remedy)
    adapter: TypeAdapter[Method] = TypeAdapter(METHODS[name])
    try:
        return adapter.validate_python(dict(options or {}))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].replace("Input should be", "must be", 1)
        raise RecipeError(
            f"method '{name}': option {place}: {message}, not {first['input']!r}"
        ) from error
