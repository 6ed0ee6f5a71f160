"""The rows and columns of the table of transforms: methods as recipes, and precisions.

All weights have one scale per row and are rounded to nearest, whatever a method is published with,
so that rows differ by their transforms alone; but for one row, whose weights are GPTQ's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

FLOAT_WEIGHTS: Final = ("lm_head*", "*embed*")

Step = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Precision:
    """A column: formats of weights and activations.

    Attributes:
        weights: A weight format.
        activations: An activation format.
        granularity: What has a scale of its own.
        meaning: In words.
    """

    weights: str
    activations: str
    granularity: str
    meaning: str

    @property
    def rounding(self) -> dict[str, str]:
        """What steps that search scales are told."""
        return {
            "weights": self.weights,
            "activations": self.activations,
            "granularity": self.granularity,
        }


PRECISIONS: Final[Mapping[str, Precision]] = {
    "W8A8 tensor": Precision("int8", "int8", "tensor", "one static scale per input"),
    "W6A6": Precision("int6", "int6", "token", "one scale per token"),
    "W4A8": Precision("int4", "int8", "token", "one scale per token"),
    "W4A4": Precision("int4", "int4", "token", "one scale per token"),
}

OUTLIERS: Final = "W8A8 tensor, outliers"
"""The column of the model with artificial outliers; its precision is that of the first column."""


def precision_of(column: str) -> Precision:
    """The precision of a column."""
    return PRECISIONS["W8A8 tensor" if column == OUTLIERS else column]


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        transforms: The steps in front of quantization, for a precision.
        by_cluster: Whether activations have one static grid per cluster of channels, in place of
            the column's granularity.
        kept: Override of a precision: weights and inputs that have 8 bits.
        rounding: How weights are rounded, where not to the nearest: options of `quantize_weights`.
    """

    transforms: Callable[[Precision], list[Step]]
    by_cluster: bool = False
    kept: str | None = None
    rounding: Mapping[str, str] = field(default_factory=dict)

    def quantization(self, precision: Precision) -> list[Step]:
        """The steps behind the transforms."""
        wide = [{"match": self.kept, "format": "int8"}] if self.kept else []
        weights = {"format": precision.weights, "ignore": FLOAT_WEIGHTS, "overrides": wide}
        weights |= self.rounding
        inputs: dict[str, Any] = {"format": precision.activations, "ignore": FLOAT_WEIGHTS}
        if self.by_cluster:
            return [{"quantize_weights": weights}, {"quantize_clusters": inputs}]
        inputs |= {"granularity": precision.granularity, "overrides": wide}
        return [{"quantize_weights": weights}, {"quantize_activations": inputs}]


ONLINE: Final = ["down_proj", "o_proj"]
"""Where rotations stay in the program."""

SPINQUANT_STEPS: Final = 20
"""Of 512 tokens; the paper has 100 of 16,384, and a step takes some seconds on a CPU core."""


def _smooth(method: str, **options: Any) -> Callable[[Precision], list[Step]]:
    return lambda precision: [{"smooth": {"method": method, **precision.rounding, **options}}]


def _plain(*steps: Step) -> Callable[[Precision], list[Step]]:
    return lambda _: list(steps)


_ONLINE_ONLY: Final[Step] = {"rotate": {"residual": "none", "value": "none", "online": ONLINE}}


def _smooth_then(rotation: Step) -> Callable[[Precision], list[Step]]:
    smooth = _smooth("smoothquant", online=ONLINE)
    return lambda precision: [*smooth(precision), rotation]


def _duquant(precision: Precision) -> list[Step]:
    return [*_smooth("smoothquant")(precision), {"duquant": {}}]


def _atq(precision: Precision) -> list[Step]:
    return [{"atq": {"weights": precision.weights, "activations": precision.activations}}]


def _spinquant(precision: Precision) -> list[Step]:
    trained = {"bits": int(precision.activations.removeprefix("int")), "weights": precision.weights}
    plan = {"steps": SPINQUANT_STEPS, "batch_tokens": 512}
    return [_ONLINE_ONLY, {"spinquant": {**trained, **plan}}]


METHODS: Final[Mapping[str, Method]] = {
    "none": Method(_plain()),
    "smoothquant": Method(_smooth("smoothquant")),
    "os+": Method(_smooth("os+")),
    "awq": Method(_smooth("awq")),
    "atq": Method(_atq),
    "quarot": Method(_plain({"rotate": {"online": ONLINE}})),
    "quarot, gptq": Method(_plain({"rotate": {"online": ONLINE}}), rounding={"method": "gptq"}),
    "smoothquant, quarot": Method(_smooth_then({"rotate": {"online": ONLINE}})),
    "duquant": Method(_duquant),
    "spinquant": Method(_spinquant),
    "resq": Method(_plain(_ONLINE_ONLY, {"resq": {}}), kept="*.high"),
    "quip": Method(_plain({"quip": {}})),
    "rptq": Method(_plain({"rptq": {}}), by_cluster=True),
}
"""Every row by name."""
