"""What a recipe consists of: the classes that check it and that passes take their options from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, TypeGuard

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from qcompile.errors import QCompileError, suggest

FLOAT: Final = "float"
"""The name that stands for "not quantized" where a format may be given."""


class _Strict(BaseModel):
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
        raise _custom_error("format", error.message, error.remedy) from error


def _canonical_format_or_float(name: str) -> str:
    return FLOAT if name == FLOAT else _canonical_format(name)


def _canonical_activations(name: str) -> str:
    from qcompile.passes.quantize import activation_formats  # pulls in torch

    try:
        return str(activation_formats.parse_activation_format(name))
    except QCompileError as error:
        raise _custom_error("format", error.message, error.remedy) from error


def _non_empty(pattern: str) -> str:
    if not pattern:
        raise _custom_error("pattern", "an empty pattern matches no name", "leave it out")
    return pattern


def _known_method(name: str) -> str:
    from qcompile.passes.quantize.methods import make_method  # pulls in torch

    try:
        make_method(name)
    except QCompileError as error:
        raise _custom_error("method", error.message, error.remedy) from error
    return name


WeightFormat = Annotated[str, AfterValidator(_canonical_format)]
"""A weight format by name, such as ``"int4-g64-asym-bf16"``; kept in its canonical spelling."""

WeightFormatOrFloat = Annotated[str, AfterValidator(_canonical_format_or_float)]
"""A weight format by name, or ``"float"`` for a weight that stays as it is."""

ActivationFormat = Annotated[str, AfterValidator(_canonical_activations)]
"""A format of activations by name, such as ``"int8"`` or ``"fp8"``; kept in its canonical form."""

WeightMethod = Annotated[str, AfterValidator(_known_method)]
"""A way to choose the codes of weights, by name, such as ``"gptq"``."""

Pattern = Annotated[str, AfterValidator(_non_empty)]
"""A shell-style pattern (``*``, ``?``, ``[...]``) on a weight's name in the checkpoint.

It matches the name with or without its final ``.weight``.
"""


class StepOptions(_Strict):
    """The options of one step; every step has its own subclass."""


class WeightOverride(_Strict):
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
            raise _custom_error(
                "budget", "target_bits and target_size are two budgets", "leave one of them out"
            )
        if self.candidates and not self.has_budget:
            raise _custom_error(
                "budget", "candidates without a budget", "add target_bits or target_size"
            )
        if self.target_size is not None:
            try:
                parse_bytes(self.target_size)
            except QCompileError as error:
                raise _custom_error("budget", error.message, error.remedy) from error
        return self

    @model_validator(mode="after")
    def _check_options(self) -> QuantizeWeights:
        from qcompile.passes.quantize.methods import make_method  # pulls in torch

        try:
            make_method(self.method, self.options)
        except QCompileError as error:
            raise _custom_error("method", error.message, error.remedy) from error
        return self


IntegerActivations = Literal["int2", "int3", "int4", "int5", "int6", "int7", "int8"]
"""Activations in whole numbers by name."""


class ActivationOverride(_Strict):
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
        format: Format of the codes: ``"int2"`` to ``"int8"``, ``"fp8"`` (or ``"e4m3"``) or
            ``"e5m2"``, all symmetric; ``"int8-asym"`` and the like, which have zero points, need
            static scales.
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
            raise _custom_error("format", error.message, error.remedy) from error
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


class Rotate(StepOptions):
    """Step ``rotate``: rotations spread outliers over all channels; the function stays the same.

    Attributes:
        residual: What rotates the residual stream: a randomized ``"hadamard"`` matrix, a random
            ``"orthogonal"`` one, or ``"none"``.
        value: The same for the values of each attention head.
        online: Where a Hadamard transform stays in the program: before the linear behind an
            activation (``"down_proj"``), before the one behind attention (``"o_proj"``), on queries
            and keys after their rotary embedding (``"query_key"``).
        seed: For signs and random matrices.
    """

    residual: Literal["hadamard", "orthogonal", "none"] = "hadamard"
    value: Literal["hadamard", "orthogonal", "none"] = "hadamard"
    online: tuple[Literal["down_proj", "o_proj", "query_key"], ...] = ("down_proj",)
    seed: int = 0


class Smooth(StepOptions):
    """Step ``smooth``: scales move outliers from activations into the weights that read them.

    Needs calibration data. Comes before ``rotate``, which takes away the gains that take up scales.

    Attributes:
        method: The rule that scales follow.
        strength: Its parameter (SmoothQuant's alpha, AWQ's exponent, the threshold of ``os+`` over
            the largest activation); None searches it for each site.
        weights: The format that the search rounds weights to: that of ``quantize_weights``.
        activations: What the search rounds activations to: as ``quantize_activations``, or
            ``"float"`` where these stay floats.
        granularity: Whether activations have a scale per ``"token"`` or per ``"tensor"``.
        online: Linears before which a ``rotate`` step behind this one leaves a Hadamard transform.
        ignore: Patterns on names of weights; what one of them reads is not scaled.
    """

    method: Literal["smoothquant", "awq", "os+", "preshift"] = "smoothquant"
    strength: float | None = Field(default=None, gt=0, lt=1)
    weights: WeightFormat = "int8"
    activations: Literal["float", "int2", "int3", "int4", "int5", "int6", "int7", "int8"] = "int8"
    granularity: Literal["token", "tensor"] = "token"
    online: tuple[Literal["down_proj", "o_proj"], ...] = ()
    ignore: tuple[Pattern, ...] = ()


class Duquant(StepOptions):
    """Step ``duquant``: rotations in blocks and a permutation before linears, fit to their inputs.

    Needs calibration data. Scale channels first (step ``smooth``), as the paper does.

    Attributes:
        block_size: Channels per block at most; the largest divisor of an input's channels up to
            this is taken.
        steps: Greedy steps to try for each rotation.
        ignore: Patterns on names of weights whose inputs stay as they are.
        seed: For the free part of rotations.
    """

    block_size: int = Field(default=128, ge=2)
    steps: int = Field(default=256, ge=1)
    ignore: tuple[Pattern, ...] = ()
    seed: int = 0


class Spinquant(StepOptions):
    """Step ``spinquant``: rotations of the residual stream and of values, learned on the loss.

    Needs calibration data. Leave online Hadamard transforms by a ``rotate`` step before it.

    Attributes:
        bits: Width that activations are rounded to in training.
        steps: Steps of one micro-batch each.
        rate: The largest step at the start; it falls along a cosine.
        batch_tokens: Tokens per micro-batch; a window is not cut.
        seed: For the Hadamard matrices that training starts from.
    """

    bits: int = Field(default=4, ge=2, le=8)
    steps: int = Field(default=100, ge=1)
    rate: float = Field(default=1.5, gt=0)
    batch_tokens: int = Field(default=2048, ge=2)
    seed: int = 0


class Resq(StepOptions):
    """Step ``resq``: directions of large variance become channels of their own, for more bits.

    Needs calibration data. Weights ``q`` become ``q.low`` and ``q.high``: give ``*.high`` more bits
    by ``overrides`` of ``quantize_weights`` and ``quantize_activations``.

    Attributes:
        fraction: Of the channels of each basis that form the high part.
        multiple: High parts of the residual stream are multiples of this.
        query_key: Whether queries and keys are turned into such a basis behind their rotary
            embedding, by nodes that stay.
        seed: For the rotations of each part.
    """

    fraction: float = Field(default=0.125, gt=0, lt=1)
    multiple: int = Field(default=8, ge=1)
    query_key: bool = False
    seed: int = 0


class Atq(StepOptions):
    """Step ``atq``: scales that keep the sum of both rounding errors of each layer small.

    Needs calibration data. Quantize weights by ``gptq`` behind it.

    Attributes:
        weights: The format that the search rounds weights to: that of ``quantize_weights``.
        activations: What the search rounds activations to, per token.
        ignore: Patterns on names of weights; what one of them reads is not scaled.
    """

    weights: WeightFormat = "int8"
    activations: IntegerActivations = "int8"
    ignore: tuple[Pattern, ...] = ()


class Rptq(StepOptions):
    """Step ``rptq``: channels of like ranges side by side, for ``quantize_clusters``.

    Needs calibration data.

    Attributes:
        clusters: Per input of linears, at most.
        head_clusters: Per head behind attention, at most.
        ignore: Patterns on names of weights whose inputs stay as they are.
    """

    clusters: int = Field(default=32, ge=1)
    head_clusters: int = Field(default=4, ge=1)
    ignore: tuple[Pattern, ...] = ()


class QuantizeClusters(StepOptions):
    """Step ``quantize_clusters``: activations become codes of static grids, one per cluster.

    Needs calibration data, and stands in the place of ``quantize_activations``.

    Attributes:
        format: Format of the codes, asymmetric.
        ignore: Patterns on names of weights whose inputs stay float.
    """

    format: IntegerActivations = "int8"
    ignore: tuple[Pattern, ...] = ()


class Quip(StepOptions):
    """Step ``quip``: random rotations on both sides of weights, which stay in the program.

    Attributes:
        rotation: A randomized ``"hadamard"`` transform, or the ``"kronecker"`` product of two
            random orthogonal matrices.
        rescale: Whether to balance the channels of inputs and weights, which needs calibration
            data.
        ignore: Patterns on names of weights that stay as they are.
        seed: For signs and random matrices.
    """

    rotation: Literal["hadamard", "kronecker"] = "hadamard"
    rescale: bool = True
    ignore: tuple[Pattern, ...] = ()
    seed: int = 0


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
            raise _custom_error(
                "step",
                f"a step is one name and its options, not {len(data)} keys",
                "write every step as a list item of its own: '- step: {option: value}'",
            )
        ((name, options),) = data.items()
        if name not in STEPS:
            raise _custom_error("step", f"unknown step '{name}'", suggest(str(name), STEPS))
        return {"name": name, "options": STEPS[name].model_validate(options or {})}

    @model_serializer
    def _to_mapping(self) -> dict[str, Any]:
        return {self.name: self.options.model_dump(mode="json")}


class Recipe(_Strict):
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
                raise _custom_error(
                    "order",
                    f"step '{name}' stands {names.count(name)} times",
                    "keep one; its options say what differs by layer",
                )
        for last, reason in _AFTER_TRANSFORMS.items():
            for name in names[names.index(last) :] if last in names else ():
                if name in TRANSFORM_STEPS:
                    raise _custom_error(
                        "order",
                        f"{name} comes after {last}: {reason}",
                        f"put {name} before {last}",
                    )
        for name in ("quantize_activations", "quantize_clusters"):
            if name in names and "quantize_weights" not in names[: names.index(name)]:
                raise _custom_error(
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


def _custom_error(kind: str, message: str, remedy: str | None) -> PydanticCustomError:
    """A complaint whose text may hold braces, which pydantic would take for placeholders."""
    context = {"message": message} if remedy is None else {"message": message, "remedy": remedy}
    return PydanticCustomError(kind, "{message}", context)


def is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    """Whether ``value`` is a mapping, as type checkers understand it."""
    return isinstance(value, Mapping)
