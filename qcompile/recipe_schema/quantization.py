"""Options of the steps that quantize: weights, activations, caches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from qcompile.errors import QCompileError
from qcompile.recipe_schema.values import (
    ActivationFormat,
    IntegerActivations,
    Pattern,
    StepOptions,
    Strict,
    WeightFormat,
    WeightFormatOrFloat,
    WeightMethod,
    complaint,
)


class WeightOverride(Strict):
    """The format of the weights that a pattern matches.

    Attributes:
        match: Pattern on weight names.
        format: Their format, or ``"float"`` to leave them as they are.
    """

    match: Pattern
    format: WeightFormatOrFloat


class QuantizeWeights(StepOptions):
    """Step ``quantize_weights``: weights of linear and embedding layers become codes.

    Attributes:
        format: Format of all weights that nothing below names.
        method: How codes are chosen; ``"rtn"`` rounds to the nearest, ``"gptq"`` and others look
            at calibration data.
        options: Options of the method, by name.
        scale_search: What scales minimize: the clipping (``"absmax"``: none is clipped), the
            squared error (``"mse"``: slower, better below 8 bit), or that to the power 2.4
            (``"l2.4"``).
        sequential: Whose quantized weights calibration data has gone through when it meets a
            layer: those of every ``"layer"`` before it, of every ``"block"`` before its own, or
            of ``"none"``.
        rounds: How often calibration data goes through the model; from the second time on, what
            ``sequential`` leaves float has the quantized weights of the round before.
        ignore: Patterns on names of weights that stay float.
        embedding: Format of the token embedding. None: that of ``lm_head`` where both are one
            tensor, else it stays float.
        lm_head: Format of the output projection to the vocabulary. None: ``format``.
        overrides: Formats by pattern; the last match wins, over all of the above but ``ignore``.
        target_bits: Stored bits per weight, on average over the linears that nothing above names:
            each gets the one of ``candidates`` that serves the whole best, by sensitivities that
            are measured on calibration data.
        target_size: The same for the bytes of all weights together, embeddings included: a number,
            or such as ``"80MiB"``.
        candidates: Formats to choose from. None: those of ``format``'s kind, by width.
    """

    format: WeightFormat
    method: WeightMethod = "rtn"
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    scale_search: Literal["absmax", "mse", "l2.4"] = "absmax"
    sequential: Literal["layer", "block", "none"] = "layer"
    rounds: int = Field(default=1, ge=1)
    ignore: tuple[Pattern, ...] = ()
    embedding: WeightFormatOrFloat | None = None
    lm_head: WeightFormatOrFloat | None = None
    overrides: tuple[WeightOverride, ...] = ()
    target_bits: float | None = Field(default=None, gt=0, le=32)
    target_size: int | str | None = None
    candidates: tuple[WeightFormat, ...] = ()

    @property
    def has_budget(self) -> bool:
        """Whether formats are chosen for a budget."""
        return self.target_bits is not None or self.target_size is not None

    @model_validator(mode="after")
    def _check_budget(self) -> QuantizeWeights:
        from qcompile.calibration.settings import parse_bytes  # pulls in torch

        if self.target_bits is not None and self.target_size is not None:
            raise complaint(
                "budget", "target_bits and target_size are two budgets", "leave one of them out"
            )
        if self.candidates and not self.has_budget:
            raise complaint(
                "budget", "candidates without a budget", "add target_bits or target_size"
            )
        if self.target_size is not None:
            try:
                parse_bytes(self.target_size)
            except QCompileError as error:
                raise complaint("budget", error.message, error.remedy) from error
        return self

    @model_validator(mode="after")
    def _check_options(self) -> QuantizeWeights:
        from qcompile.passes.quantize.methods import make_method  # pulls in torch

        try:
            make_method(self.method, self.options)
        except QCompileError as error:
            raise complaint("method", error.message, error.remedy) from error
        return self


class ActivationOverride(Strict):
    """The format of the inputs of weights that a pattern matches.

    Attributes:
        match: Pattern on weight names.
        format: Of their inputs.
    """

    match: Pattern
    format: ActivationFormat


class QuantizeActivations(StepOptions):
    """Step ``quantize_activations``: inputs of linears with quantized weights become codes.

    Attributes:
        format: Format of the codes: ``"int2"`` to ``"int8"``, small floats such as ``"fp8"`` (or
            ``"e4m3"``) and ``"fp4"`` (``"e2m1"``), all symmetric; ``"fp4-searched"`` and the like,
            whose split into exponent and mantissa calibration data decides for each input;
            ``"int8-asym"`` and the like, which have zero points and need static scales.
        granularity: One scale per ``"token"``, or per token and ``"group"`` of the weight, computed
            from each input as it comes; or static ones, from calibration data, one per ``"tensor"``
            or per ``"channel"``.
        ranges: What static scales per tensor span: all that calibration saw, a percentile of it, or
            what loses least when rounded.
        percentile: The fraction of values that ``"percentile"`` does not clip.
        ignore: Patterns on names of weights whose inputs stay float.
        overrides: Formats by pattern on names of weights; the last match wins.
    """

    format: ActivationFormat = "int8"
    granularity: Literal["token", "group", "tensor", "channel"] = "token"
    ranges: Literal["absmax", "percentile", "mse"] = "absmax"
    percentile: float = Field(default=0.9999, gt=0.5, le=1)
    ignore: tuple[Pattern, ...] = ()
    overrides: tuple[ActivationOverride, ...] = ()

    @model_validator(mode="after")
    def _check_together(self) -> QuantizeActivations:
        from qcompile.passes.quantize import quantize_activations  # pulls in torch

        options = {key: getattr(self, key) for key in type(self).model_fields}
        try:
            quantize_activations.QuantizeActivations(**options)
        except QCompileError as error:
            raise complaint("format", error.message, error.remedy) from error
        return self


CacheFormat = Literal["float", "bf16", "int8", "int4"]
"""A format of key/value caches by name; integers are asymmetric."""


class QuantizeCache(StepOptions):
    """Step ``quantize_cache``: keys and values are kept in few bits.

    Comes after all steps that change bases: what the cache holds must not be transformed later.

    Attributes:
        format: Of keys and values.
        keys: Format of keys, where it is another one.
        values: Format of values, where it is another one.
        group_size: Numbers per scale along a head; 0 is one scale per head and token.
    """

    format: CacheFormat = "int8"
    keys: CacheFormat | None = None
    values: CacheFormat | None = None
    group_size: int = Field(default=0, ge=0)


class QuantizeClusters(StepOptions):
    """Step ``quantize_clusters``: activations become codes of static grids, one per cluster.

    Needs calibration data, and stands in the place of ``quantize_activations``.

    Attributes:
        format: Format of the codes, asymmetric.
        ignore: Patterns on names of weights whose inputs stay float.
    """

    format: IntegerActivations = "int8"
    ignore: tuple[Pattern, ...] = ()
