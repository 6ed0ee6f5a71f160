"""What options consist of: values that are checked as they are read, and how they are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal, TypeGuard

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from qcompile.errors import QCompileError, suggest

FLOAT: Final = "float"
"""The name that stands for "not quantized" where a format may be given."""


class Strict(BaseModel):
    """A frozen value whose unknown keys are refused with a suggestion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: object) -> object:
        unknown = [k for k in data if k not in cls.model_fields] if is_mapping(data) else []
        if unknown:
            errors: list[InitErrorDetails] = [
                {
                    "type": PydanticCustomError(
                        "unknown_key",
                        "unknown key '{key}'",
                        {"key": str(key), "remedy": suggest(str(key), cls.model_fields)},
                    ),
                    "loc": (str(key),),
                    "input": None,
                }
                for key in unknown
            ]
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return data


def _canonical_format(name: str) -> str:
    from qcompile.formats import parse_format  # pulls in torch, which reading a recipe need not

    try:
        return str(parse_format(name))
    except QCompileError as error:
        raise complaint("format", error.message, error.remedy) from error


def _canonical_format_or_float(name: str) -> str:
    return FLOAT if name == FLOAT else _canonical_format(name)


def _canonical_activations(name: str) -> str:
    from qcompile.passes.quantize import activation_formats  # pulls in torch

    try:
        return str(activation_formats.parse_activation_format(name))
    except QCompileError as error:
        raise complaint("format", error.message, error.remedy) from error


def _canonical_activations_or_float(name: str) -> str:
    return FLOAT if name == FLOAT else _canonical_activations(name)


def _non_empty(pattern: str) -> str:
    if not pattern:
        raise complaint("pattern", "an empty pattern matches no name", "leave it out")
    return pattern


def _known_method(name: str) -> str:
    from qcompile.passes.quantize.methods import make_method  # pulls in torch

    try:
        make_method(name)
    except QCompileError as error:
        raise complaint("method", error.message, error.remedy) from error
    return name


WeightFormat = Annotated[str, AfterValidator(_canonical_format)]
"""A weight format by name, such as ``"int4-g64-asym-bf16"``; kept in its canonical spelling."""

WeightFormatOrFloat = Annotated[str, AfterValidator(_canonical_format_or_float)]
"""A weight format by name, or ``"float"`` for a weight that stays as it is."""

ActivationFormat = Annotated[str, AfterValidator(_canonical_activations)]
"""A format of activations by name, such as ``"int8"`` or ``"fp8"``; kept in its canonical form."""

ActivationFormatOrFloat = Annotated[str, AfterValidator(_canonical_activations_or_float)]
"""A format of activations by name, or ``"float"`` where they stay as they are."""

WeightMethod = Annotated[str, AfterValidator(_known_method)]
"""A way to choose the codes of weights, by name, such as ``"gptq"``."""

Pattern = Annotated[str, AfterValidator(_non_empty)]
"""A shell-style pattern (``*``, ``?``, ``[...]``) on a weight's name in the checkpoint.

It matches the name with or without its final ``.weight``.
"""

IntegerActivations = Literal["int2", "int3", "int4", "int5", "int6", "int7", "int8"]
"""Activations in whole numbers by name."""


class StepOptions(Strict):
    """The options of one step; every step has its own subclass."""


def complaint(kind: str, message: str, remedy: str | None) -> PydanticCustomError:
    """A complaint whose text may hold braces, which pydantic would take for placeholders."""
    context = {"message": message} if remedy is None else {"message": message, "remedy": remedy}
    return PydanticCustomError(kind, "{message}", context)


def is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    """Whether ``value`` is a mapping, as type checkers understand it."""
    return isinstance(value, Mapping)
