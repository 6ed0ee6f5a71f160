"""Inputs of linears with quantized weights become codes; scales are measured now or at run time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor, fx

from qcompile.calibration.requests import Request
from qcompile.calibration.statistics import ChannelRange, Histogram
from qcompile.errors import RecipeError
from qcompile.formats import stored_weight
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Lossy, Numerics, Pass, PassResult, Skip
from qcompile.passes.measure import measure
from qcompile.passes.quantize.activation_formats import (
    ActivationFormat,
    Grid,
    parse_activation_format,
    store_grid,
)
from qcompile.passes.quantize.activation_ranges import RANGE_METHODS, RangeMethod, tensor_grid
from qcompile.passes.quantize.layers import LINEAR
from qcompile.passes.quantize.policy import Override, matches_any
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
        format: Of its codes.
        stem: What its stored scales are named after.
        readers: Linears, or what puts parts of their inputs together.
        weights: Names of the linears' weights.
    """

    value: fx.Node
    group_size: int
    format: ActivationFormat
    stem: str
    readers: list[fx.Node]
    weights: list[str]


Grids = dict[tuple[fx.Node, ActivationFormat], Grid[Tensor]]
"""Static grids by value and format: of tensors ``[1]``, or ``[K]`` per channel."""


class QuantizeActivations(Pass):
    """Rounds the input of each linear whose weight is quantized.

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

    8-bit floats have ``qc.float8_scale``, ``qc.quantize_float8`` and ``qc.lookup`` in these places.
    Linears that share an input, a group size and a format share the nodes. Where columns of a
    weight stay floats, their inputs do; those of each other part are rounded by themselves. Each
    rounded input leaves a record in the result's details: ``input, format, group_size, weights``,
    and ``scale`` where it is one static number.

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
        formats = (self._format, *(format for _, format in self._overrides))
        if not self._is_static and any(format.has_zero_point for format in formats):
            raise RecipeError(
                f"scales per {granularity} are measured at run time and have no zero points",
                remedy="use granularity 'tensor' or 'channel', or a format without -asym",
            )

    def format_of(self, name: str) -> ActivationFormat | None:
        """What the input of a weight of this name is rounded to; None leaves it as it is."""
        if matches_any(self._ignore, name):
            return None
        matching = [format for pattern, format in self._overrides if matches_any([pattern], name)]
        return matching[-1] if matching else self._format

    def run(self, program: Program, context: Context) -> PassResult:
        """Rounds inputs, in graph order.

        Raises:
            DataError: Static scales are asked for, and there is no calibration data.
        """
        result = PassResult()
        groups = list(self._inputs(program, result))
        grids = self._measure(program, groups, context) if self._is_static else {}
        editor = Editor(program)
        for group in groups:
            detail: dict[str, object] = {
                "input": group.value.name,
                "format": str(group.format),
                "group_size": group.group_size,
                "weights": group.weights,
            }
            with editor.before(group.readers[0]):
                if self._is_static:
                    numbers = grids[group.value, group.format]
                    grid = store_grid(editor, group.stem, numbers)
                    if numbers.scale.numel() == 1 and not numbers.scale.is_meta:
                        detail["scale"] = float(numbers.scale)
                else:
                    grid = group.format.measure(editor, group.value, group.group_size)
                rounded = group.format.emit(editor, group.value, grid, group.group_size)
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
        found: dict[tuple[fx.Node, int, ActivationFormat], RoundedInput] = {}
        for linear in program.calls(LINEAR):
            weight = stored_weight(linear.args[1])
            source = linear.args[0]
            if weight is None or not isinstance(source, fx.Node):
                continue
            format = self.format_of(weight.name)
            if format is None:
                result.skips.append(Skip(weight.name, "its input is kept float by the recipe"))
                continue
            if source.target in _DECODES:
                result.skips.append(Skip(weight.name, "its input is rounded already"))
                continue
            for read in coded_reads(program, linear, weight):
                size = {"group": read.group_size, "channel": 1}.get(self._granularity, 0)
                group = RoundedInput(read.value, size, format, read.stem, [], [])
                entry = found.setdefault((read.value, size, format), group)
                entry.readers.append(read.reader)
                entry.weights.append(weight.name)
        yield from found.values()

    def scale_shape(self, group: RoundedInput) -> tuple[int]:
        """The shape of an input's static scale."""
        channels = int(group.value.meta["val"].shape[-1])
        return (channels if self._granularity == "channel" else 1,)

    def _measure(self, program: Program, inputs: Sequence[RoundedInput], context: Context) -> Grids:
        """Grids of inputs in their formats, measured on the context's calibration data."""
        seen = ChannelRange if self._granularity == "channel" else Histogram
        found = measure(
            program,
            [Request(group.value, seen) for group in inputs],
            context,
            "activation quantization with static scales",
        )
        grids: Grids = {}
        for group in inputs:
            key = (group.value, group.format)
            if seen is ChannelRange:
                channels = found.of(group.value, ChannelRange)
                grids[key] = group.format.grid(channels.low, channels.high)
            else:
                values = found.of(group.value, Histogram)
                grids[key] = tensor_grid(values, group.format, self._ranges, self._percentile)
        return grids


_DECODES = frozenset({dialect.dequantize, dialect.lookup})
"""What ends a rounding, and what stored weights are decoded by."""


def _override(item: Override | Mapping[str, str]) -> tuple[str, ActivationFormat]:
    if isinstance(item, Mapping):
        return item["match"], parse_activation_format(item["format"])
    return item.match, parse_activation_format(item.format)
