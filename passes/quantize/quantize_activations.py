"""Inputs of linears with quantized weights become codes; scales are measured now or at run time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, fx

from qcompile.calibration.requests import Request, Statistics
from qcompile.calibration.statistics import ChannelRange, Histogram, Statistic
from qcompile.errors import RecipeError
from qcompile.formats import stored_weight
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Lossy, Numerics, Pass, PassResult, Skip
from qcompile.passes.measure import measure
from qcompile.passes.quantize.activation_formats import (
    ActivationChoice,
    ActivationFormat,
    Grid,
    parse_activation_format,
    store_grid,
)
from qcompile.passes.quantize.activation_ranges import (
    RANGE_METHODS,
    RangeMethod,
    rounding_error,
    tensor_grid,
)
from qcompile.passes.quantize.layers import LINEAR
from qcompile.passes.quantize.policy import Override, matches_any
from qcompile.passes.quantize.rounding_errors import RoundingErrors, Trial
from qcompile.passes.quantize.split_experts import split_call
from qcompile.passes.quantize.split_inputs import coded_reads

Granularity = Literal["token", "group", "tensor", "channel"]
"""One scale per token, or per token and group of the weight, both measured at run time; one for
all tokens, or one per channel for all tokens, both from calibration."""

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

_STATIC = frozenset({"tensor", "channel"})


@dataclass
class RoundedInput:
    """A value, and the nodes that read it rounded alike.

    Attributes:
        value: The value.
        group_size: Channels per scale; 0 is one scale for all.
        choice: What its codes may be.
        stem: What its stored scales are named after.
        readers: Linears, or what puts parts of their inputs together.
        weights: Names of the linears' weights.
    """

    value: fx.Node
    group_size: int
    choice: ActivationChoice
    stem: str
    readers: list[fx.Node]
    weights: list[str]


@dataclass(frozen=True, eq=False)
class Rounding:
    """What an input is rounded to.

    Attributes:
        format: Of its codes.
        grid: Its static grid, ``[1]`` or ``[K]`` per channel; None: measured at run time.
    """

    format: ActivationFormat
    grid: Grid[Tensor] | None = None


_WEIGHTS: Mapping[Any, int] = {LINEAR: 1, dialect.expert_hidden: 2, dialect.expert_output: 3}
"""What multiplies with a weight, and where that stands among its arguments; inputs come first."""


class QuantizeActivations(Pass):
    """Rounds the input of each linear and each routed expert whose weight is quantized.

    Before::

        %2 = aten.linear(%x, %w)

    After, with dynamic scales (per token, or per token and group)::

        %2 = qc.dynamic_scale(%x, 8, 64)
        %3 = qc.quantize(%x, %2, None, 8, 64)
        %4 = qc.dequantize(%3, %2, None, 8, 64)
        %5 = aten.linear(%4, %w)

    and with static ones (per tensor, or per channel)::

        %2 = qc.quantize(%x, @w.input_scale, None, 8, 0)
        %3 = qc.dequantize(%2, @w.input_scale, None, 8, 0)
        %4 = aten.linear(%3, %w)

    Floats have ``qc.float_scale``, ``qc.quantize_float`` and ``qc.lookup`` in these places.
    Routed experts become two nodes, ``qc.expert_hidden`` and ``qc.expert_output``, since their
    second matrices read what stands between. Layers that share an input, a group size and a format
    share the nodes. Where columns of a weight stay floats, their inputs do; those of each other
    part are rounded by themselves. Each rounded input leaves a record in the result's details:
    ``input, format, group_size, weights``, ``choice`` where the recipe leaves one, and ``scale``
    where it is one static number.

    Where the recipe leaves a choice of formats, ``"fp4-searched"``, each input gets the one that
    calibration data loses least by (squared error), with the scales that it will have.

    Args:
        format: A name; see `qcompile.passes.quantize.activation_formats`.
        granularity: What has a scale of its own. A group is one of the weight; a weight with one
            group per row is rounded per token.
        ranges: What static scales span: ``"absmax"``, ``"percentile"`` or ``"mse"``; per channel
            only ``"absmax"``.
        percentile: The fraction of magnitudes that ``"percentile"`` does not clip.
        ignore: Patterns on names of weights whose inputs stay float.
        overrides: ``{"match": pattern, "format": name}``, or objects with these attributes, on
            names of weights whose inputs have another format; the last match wins.

    Raises:
        RecipeError: A format, the granularity or what ranges span is unknown, or they do not fit
            together.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.WEIGHTS_QUANTIZED})
    numerics: ClassVar[Numerics] = Lossy()

    def __init__(
        self,
        format: str = "int8",
        *,
        granularity: str = "token",
        ranges: str = "absmax",
        percentile: float = 0.9999,
        ignore: Iterable[str] = (),
        overrides: Iterable[Override | Mapping[str, str]] = (),
    ) -> None:
        for value, known in ((granularity, GRANULARITIES), (ranges, RANGE_METHODS)):
            if value not in known:
                raise RecipeError(
                    f"unknown choice '{value}' for activations",
                    remedy=f"known: {', '.join(known)}",
                )
        if granularity == "channel" and ranges != "absmax":
            raise RecipeError(
                f"scales per channel span 'absmax', not '{ranges}'",
                remedy="use granularity 'tensor', or leave ranges out",
            )
        self._format = parse_activation_format(format)
        self._granularity = granularity
        self._ranges: RangeMethod = next(m for m in RANGE_METHODS if m == ranges)
        self._percentile = percentile
        self._ignore = tuple(ignore)
        self._overrides = [_override(item) for item in overrides]
        choices = (self._format, *(choice for _, choice in self._overrides))
        formats = [format for choice in choices for format in choice.candidates]
        if not self._is_static and any(format.has_zero_point for format in formats):
            raise RecipeError(
                f"scales per {granularity} are measured at run time and have no zero points",
                remedy="use granularity 'tensor' or 'channel', or a format without -asym",
            )
        if granularity == "channel" and len(formats) > len(choices):
            raise RecipeError(
                "no format is searched where scales are per channel",
                remedy="use granularity 'token', 'group' or 'tensor', or name the format: e2m1",
            )

    def format_of(self, name: str) -> ActivationChoice | None:
        """What the input of a weight of this name is rounded to; None leaves it as it is."""
        if matches_any(self._ignore, name):
            return None
        matching = [format for pattern, format in self._overrides if matches_any([pattern], name)]
        return matching[-1] if matching else self._format

    def run(self, program: Program, context: Context) -> PassResult:
        """Rounds inputs, in graph order.

        Raises:
            DataError: Static scales or searched formats are asked for, and there is no calibration
                data.
        """
        result = PassResult()
        editor = Editor(program)
        for call in list(program.calls(dialect.experts)):
            if self._rounds(call):
                split_call(editor, call)
        groups = list(self._inputs(program, result))
        for group, rounding in zip(groups, self._choose(program, groups, context), strict=True):
            format, numbers = rounding.format, rounding.grid
            detail: dict[str, object] = {
                "input": group.value.name,
                "format": str(format),
                "group_size": group.group_size,
                "weights": group.weights,
            }
            if group.choice != format:
                detail["choice"] = str(group.choice)
            with editor.before(group.readers[0]):
                if numbers is None:
                    grid = format.measure(editor, group.value, group.group_size)
                else:
                    grid = store_grid(editor, group.stem, numbers)
                    if numbers.scale.numel() == 1 and not numbers.scale.is_meta:
                        detail["scale"] = float(numbers.scale)
                rounded = format.emit(editor, group.value, grid, group.group_size)
            for reader in group.readers:
                reader.replace_input_with(group.value, rounded)
            result.rewrites += len(group.readers)
            result.details.append(detail)
        return result

    @property
    def _is_static(self) -> bool:
        return self._granularity in _STATIC

    def _inputs(self, program: Program, result: PassResult) -> Iterator[RoundedInput]:
        """The values to round, in graph order; linears that are passed over become skips."""
        found: dict[tuple[fx.Node, int, ActivationChoice], RoundedInput] = {}
        for linear in program.calls(*_WEIGHTS):
            weight = stored_weight(linear.args[_WEIGHTS[linear.target]])
            source = linear.args[0]
            if weight is None or not isinstance(source, fx.Node):
                continue
            choice = self.format_of(weight.name)
            if choice is None:
                result.skips.append(Skip(weight.name, "its input is kept float by the recipe"))
                continue
            if source.target in _DECODES:
                result.skips.append(Skip(weight.name, "its input is rounded already"))
                continue
            for read in coded_reads(program, linear, weight):
                size = {"group": read.group_size, "channel": 1}.get(self._granularity, 0)
                group = RoundedInput(read.value, size, choice, read.stem, [], [])
                entry = found.setdefault((read.value, size, choice), group)
                entry.readers.append(read.reader)
                entry.weights.append(weight.name)
        yield from found.values()

    def _rounds(self, experts: fx.Node) -> bool:
        """Whether an input of routed experts is rounded."""
        found = map(stored_weight, experts.args)
        return any(weight and self.format_of(weight.name) is not None for weight in found)

    def scale_shape(self, group: RoundedInput) -> tuple[int] | None:
        """The shape of an input's static scale; None where it is measured at run time."""
        if not self._is_static:
            return None
        channels = int(group.value.meta["val"].shape[-1])
        return (channels if self._granularity == "channel" else 1,)

    def _choose(
        self, program: Program, inputs: Sequence[RoundedInput], context: Context
    ) -> list[Rounding]:
        """What each input is rounded to, by the context's calibration data where it is needed."""
        searched = any(len(group.choice.candidates) > 1 for group in inputs)
        if not searched and not self._is_static:
            return [Rounding(format) for group in inputs for format in group.choice.candidates]
        what = "with static scales" if self._is_static else "in searched formats"
        purpose = f"activation quantization {what}"
        found = measure(program, self._requests(inputs), context, purpose)
        return [self._least_error(group, found) for group in inputs]

    def _requests(self, inputs: Sequence[RoundedInput]) -> list[Request]:
        if self._is_static:
            seen: type[Statistic] = ChannelRange if self._granularity == "channel" else Histogram
            return [Request(group.value, seen) for group in inputs]
        trials: dict[fx.Node, list[Trial]] = {}
        for group in inputs:
            of_value = trials.setdefault(group.value, [])
            of_value += ((format, group.group_size) for format in group.choice.candidates)
        return [
            Request(value, partial(RoundingErrors, tuple(of_value)))
            for value, of_value in trials.items()
        ]

    def _least_error(self, group: RoundedInput, found: Statistics) -> Rounding:
        formats = group.choice.candidates
        if self._granularity == "channel":
            channels = found.of(group.value, ChannelRange)
            return Rounding(formats[0], formats[0].grid(channels.low, channels.high))
        if not self._is_static:
            errors = found.of(group.value, RoundingErrors)
            best = min(formats, key=lambda format: errors.of_trial(format, group.group_size))
            return Rounding(best)
        values = found.of(group.value, Histogram)
        tried = [
            Rounding(format, tensor_grid(values, format, self._ranges, self._percentile))
            for format in formats
        ]
        if len(tried) == 1:
            return tried[0]
        return min(tried, key=lambda trial: _error(values, trial))


def _error(seen: Histogram, rounding: Rounding) -> float:
    assert rounding.grid is not None
    return rounding_error(seen, rounding.format, rounding.grid)


_DECODES = frozenset({dialect.dequantize, dialect.lookup})
"""What ends a rounding, and what stored weights are decoded by."""


def _override(item: Override | Mapping[str, str]) -> tuple[str, ActivationChoice]:
    if isinstance(item, Mapping):
        return item["match"], parse_activation_format(item["format"])
    return item.match, parse_activation_format(item.format)
