"""A recipe: steps by name, in an order that makes sense."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    model_serializer,
    model_validator,
)

from qcompile.errors import suggest
from qcompile.recipe_schema.quantization import (
    QuantizeActivations,
    QuantizeCache,
    QuantizeClusters,
    QuantizeWeights,
)
from qcompile.recipe_schema.transforms import (
    Atq,
    Duquant,
    Quip,
    Resq,
    Rotate,
    Rptq,
    Smooth,
    Spinquant,
)
from qcompile.recipe_schema.values import StepOptions, Strict, complaint, is_mapping

STEPS: Final[Mapping[str, type[StepOptions]]] = MappingProxyType(
    {
        "rotate": Rotate,
        "smooth": Smooth,
        "duquant": Duquant,
        "spinquant": Spinquant,
        "resq": Resq,
        "quip": Quip,
        "rptq": Rptq,
        "atq": Atq,
        "quantize_weights": QuantizeWeights,
        "quantize_activations": QuantizeActivations,
        "quantize_clusters": QuantizeClusters,
        "quantize_cache": QuantizeCache,
    }
)
"""Every step that a recipe may contain, and its options. The compiler maps each to its pass."""


TRANSFORM_STEPS: Final = frozenset(
    {"atq", "duquant", "quip", "resq", "rotate", "rptq", "spinquant", "smooth"}
)
"""Steps that change bases and keep the function; weights must still be floats."""

_AFTER_TRANSFORMS: Final = MappingProxyType(
    {
        "quantize_weights": "codes can absorb no transform",
        "quantize_cache": "what a cache holds is rounded in its basis",
    }
)

DATA_FREE_TRANSFORMS: Final = frozenset({"rotate"})
"""Those of them that need no calibration data and read no weights."""


class Step(BaseModel):
    """One step of a recipe, ``{name: options}`` in YAML and JSON.

    Attributes:
        name: A key of `STEPS`.
        options: An instance of the class that stands there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: SerializeAsAny[StepOptions]

    @model_validator(mode="before")
    @classmethod
    def _from_mapping(cls, data: object) -> object:
        if isinstance(data, str):
            data = {data: None}
        if not is_mapping(data) or set(data) == {"name", "options"}:
            return data
        if len(data) != 1:
            raise complaint(
                "step",
                f"a step is one name and its options, not {len(data)} keys",
                "write every step as a list item of its own: '- step: {option: value}'",
            )
        ((name, options),) = data.items()
        if name not in STEPS:
            raise complaint("step", f"unknown step '{name}'", suggest(str(name), STEPS))
        return {"name": name, "options": STEPS[name].model_validate(options or {})}

    @model_serializer
    def _to_mapping(self) -> dict[str, Any]:
        return {self.name: self.options.model_dump(mode="json")}


class Recipe(Strict):
    """An ordered list of steps under a name.

    Attributes:
        name: Letters, digits, ``.``, ``_`` and ``-``.
        description: One line for the user who chooses.
        steps: What happens, in this order. None at all compiles the float program.
    """

    name: str = Field(default="custom", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)
    description: str = Field(default="", max_length=1000)
    steps: tuple[Step, ...] = ()

    @model_validator(mode="after")
    def _check_order(self) -> Recipe:
        names = [step.name for step in self.steps]
        for name in names:
            if names.count(name) > 1:
                raise complaint(
                    "order",
                    f"step '{name}' stands {names.count(name)} times",
                    "keep one; its options say what differs by layer",
                )
        for last, reason in _AFTER_TRANSFORMS.items():
            for name in names[names.index(last) :] if last in names else ():
                if name in TRANSFORM_STEPS:
                    raise complaint(
                        "order",
                        f"{name} comes after {last}: {reason}",
                        f"put {name} before {last}",
                    )
        for name in ("quantize_activations", "quantize_clusters"):
            if name in names and "quantize_weights" not in names[: names.index(name)]:
                raise complaint(
                    "order",
                    f"{name} needs a quantize_weights step before it",
                    "put quantize_weights before it",
                )
        return self

    def to_dict(self) -> dict[str, Any]:
        """The recipe with all defaults filled in, as JSON values; `load_recipe` takes it back."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The recipe with all defaults filled in, as the YAML of a recipe file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=100)
