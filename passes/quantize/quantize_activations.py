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
from qcompile.passes.quantize.activation_ranges import (
    RANGE_METHODS,
    RangeMethod,
    channel_scales,
    tensor_scale,
)
from qcompile.passes.quantize.layers import LINEAR
from qcompile.passes.quantize.policy import Override, matches_any

FORMATS = {f"int{bits}": bits for bits in range(2, 9)}
"""Activation formats, all symmetric, and the bits of their codes."""

Granularity = Literal["token", "group", "tensor", "channel"]
"""One scale per token, or per token and group of the weight, both measured at run time; one for
all tokens, or one per channel for all tokens, both from calibration."""

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

_STATIC = frozenset({"tensor", "channel"})


@dataclass
class RoundedInput:
    """A value, and the linears that read it rounded alike.

    Attributes:
        value: The value.
        group_size: Channels per scale; 0 is one scale for all.
        bits: Of its codes.
        linears: What reads it.
        weights: Their weights' names.
    """

    value: fx.Node
    group_size: int
    bits: int
    linears: list[fx.Node]
    weights: list[str]


Scales = dict[tuple[fx.Node, int], Tensor]
"""Static scales by value and bits: ``[1]``, or ``[K]`` per channel."""


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

    Linears that share an input and a group size share the nodes. Each rounded input leaves a record
    in the result's details: ``input, bits, group_size, weights``, and ``scale`` where it is one
    static number.

    Args:
        format: ``"int2"`` to ``"int8"``.
        granularity: What has a scale of its own. A group is one of the weight; a weight with one
            group per row is rounded per token.
        ranges: What static scales span: ``"absmax"``, ``"percentile"`` or ``"mse"``; per channel
            only ``"absmax"``.
        percentile: The fraction of values that ``"percentile"`` does not clip.
        ignore: Patterns on names of weights whose inputs stay float.
        overrides: ``{"match": pattern, "format": name}``, or objects with these attributes, on
            names of weights whose inputs have another format; the last match wins.

    Raises:
        RecipeError: A format, the granularity or what ranges span is unknown.
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
        self._bits = _bits(format)
        self._granularity = granularity
        self._ranges: RangeMethod = next(m for m in RANGE_METHODS if m == ranges)
        self._percentile = percentile
        self._ignore = tuple(ignore)
        self._overrides = [_override(item) for item in overrides]

    def run(self, program: Program, context: Context) -> PassResult:
        """Rounds inputs, in graph order.

        Raises:
            DataError: Static scales are asked for, and there is no calibration data.
        """
        result = PassResult()
        groups = list(self._inputs(program, result))
        scales = self._measure(program, groups, context) if self._is_static else {}
        editor = Editor(program)
        for group in groups:
            first = group.linears[0]
            detail: dict[str, object] = {
                "input": group.value.name,
                "bits": group.bits,
                "group_size": group.group_size,
                "weights": group.weights,
            }
            with editor.before(first):
                if self._is_static:
                    scale = scales[group.value, group.bits]
                    rounded = self._round_statically(editor, group, scale)
                    if scale.numel() == 1 and not scale.is_meta:
                        detail["scale"] = float(scale)
                else:
                    rounded = self._round(editor, group)
            for linear in group.linears:
                linear.update_arg(0, rounded)
            result.rewrites += len(group.linears)
            result.details.append(detail)
        return result

    @property
    def _is_static(self) -> bool:
        return self._granularity in _STATIC

    def _inputs(self, program: Program, result: PassResult) -> Iterator[RoundedInput]:
        """The values to round, in graph order; linears that are passed over become skips."""
        found: dict[tuple[fx.Node, int, int], RoundedInput] = {}
        for linear in program.calls(LINEAR):
            weight = stored_weight(linear.args[1])
            source = linear.args[0]
            if weight is None or not isinstance(source, fx.Node):
                continue
            if matches_any(self._ignore, weight.name):
                result.skips.append(Skip(weight.name, "its input is kept float by the recipe"))
                continue
            if source.target == dialect.dequantize:
                result.skips.append(Skip(weight.name, "its input is rounded already"))
                continue
            size = {"group": weight.format.group_size, "channel": 1}.get(self._granularity, 0)
            bits = self._bits_of(weight.name)
            entry = found.setdefault((source, size, bits), RoundedInput(source, size, bits, [], []))
            entry.linears.append(linear)
            entry.weights.append(weight.name)
        yield from found.values()

    def _bits_of(self, name: str) -> int:
        """The bits of the input of a weight."""
        matching = [bits for pattern, bits in self._overrides if matches_any([pattern], name)]
        return matching[-1] if matching else self._bits

    def scale_shape(self, group: RoundedInput) -> tuple[int]:
        """The shape of an input's static scale."""
        channels = int(group.value.meta["val"].shape[-1])
        return (channels if self._granularity == "channel" else 1,)

    def _measure(
        self, program: Program, inputs: Sequence[RoundedInput], context: Context
    ) -> Scales:
        """Scales of inputs at their bits, measured on the context's calibration data."""
        per_channel = self._granularity == "channel"
        wanted = [(group.value, group.bits) for group in inputs]
        found = measure(
            program,
            [Request(value, ChannelRange if per_channel else Histogram) for value, _ in wanted],
            context,
            "activation quantization with static scales",
        )
        if per_channel:
            return {
                (v, bits): channel_scales(found.of(v, ChannelRange), bits) for v, bits in wanted
            }
        return {
            (v, bits): tensor_scale(found.of(v, Histogram), bits, self._ranges, self._percentile)
            for v, bits in wanted
        }

    def _round(self, editor: Editor, group: RoundedInput) -> fx.Node:
        size = group.group_size
        scale = editor.call(dialect.dynamic_scale, group.value, group.bits, size)
        return self._rounded(editor, group, scale)

    def _round_statically(self, editor: Editor, group: RoundedInput, scale: Tensor) -> fx.Node:
        name = f"{group.weights[0].removesuffix('.weight')}.input_scale"
        editor.program.weights.put(name, scale)
        return self._rounded(editor, group, editor.weight(name))

    def _rounded(self, editor: Editor, group: RoundedInput, scale: fx.Node) -> fx.Node:
        bits, size = group.bits, group.group_size
        codes = editor.call(dialect.quantize, group.value, scale, None, bits, size)
        return editor.call(dialect.dequantize, codes, scale, None, bits, size)


def _bits(format: str) -> int:
    if format not in FORMATS:
        raise RecipeError(
            f"activations cannot be '{format}'", remedy=f"known: {', '.join(FORMATS)}"
        )
    return FORMATS[format]


def _override(item: Override | Mapping[str, str]) -> tuple[str, int]:
    if isinstance(item, Mapping):
        return item["match"], _bits(item["format"])
    return item.match, _bits(item.format)
