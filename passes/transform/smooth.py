"""Scales move outliers from activations into weights: SmoothQuant, AWQ, Outlier Suppression+."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompile.analysis.roles import NORMED
from qcompile.calibration.requests import Request, Statistics
from qcompile.calibration.statistics import ChannelMoments, ChannelRange, Rows, Statistic
from qcompile.errors import RecipeError
from qcompile.formats import Format, parse_format
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult, Skip
from qcompile.passes.measure import measure
from qcompile.passes.quantize.activation_formats import (
    ActivationFormat,
    parse_activation_format,
)
from qcompile.passes.quantize.policy import FLOAT, matches_any
from qcompile.passes.transform.absorb import absorb
from qcompile.passes.transform.peak_rows import LargestRows
from qcompile.passes.transform.smoothing.methods import RULES, Magnitudes, ScaleRule
from qcompile.passes.transform.smoothing.objective import Objective, ReaderSamples, Rounding
from qcompile.passes.transform.smoothing.scale_sites import (
    Reader,
    ScaleSite,
    find_scale_sites,
    find_shift_sites,
)
from qcompile.passes.transform.values import Diagonal, Shift, random_hadamard

Granularity = Literal["token", "tensor"]

OnlineLinear = Literal["down_proj", "o_proj"]
"""A linear behind an activation, or one behind attention."""

_MOST_ROWS = 256
"""Ordinary inputs that a choice of scales is judged on."""

_LARGEST_ROWS = 8
"""The largest ones that it is judged on beside them: about one in thirty."""

_MOST_OUTPUTS = 256
"""Outputs of a weight whose errors are looked at; they are alike, and wide layers have many."""

_LARGEST_SCALE = 1e4
"""Of a scale and of its reciprocal: what narrow floats can still hold beside ordinary numbers."""


class Smooth(Pass):
    """Divides channels by scales and multiplies the weights that read them.

    ::

        rms_norm(x, g), linear(., W)    =>   rms_norm(x, g / s), linear(., W * s)

    and likewise between values and the linear behind attention (one scale per channel of a kv head,
    shared by its query heads), and between ``up`` and ``down``: at every site that takes scales and
    that a layer reads. Sites are found by dataflow; those that cannot be scaled are skipped with
    the reason. The function stays the same.

    Scales count even in front of a rotation that stays in the program, such as `Rotate` leaves
    before a linear behind an activation: a row of one huge channel is as hard to round when it is
    spread, since it is huge as a whole. `online` tells the search of such rotations, and that the
    gains of norms need no scales: they will be folded.

    Outlier Suppression+ first moves the middle of each channel's range to zero where a bias in
    front and biases behind can take up the shift (layer norms and linears with biases).

    The strength of the rule (SmoothQuant's alpha, AWQ's r, the threshold of Outlier Suppression+)
    is searched for each site, on sampled inputs, with weights and activations rounded as they will
    be; no scaling at all takes part in the search. The result's details say
    ``sources, sinks, strength, error, error_unscaled``.

    Args:
        method: A key of `RULES`.
        strength: The same for all sites; None searches.
        weights: The format that the search rounds weights to.
        activations: What it rounds activations to, such as ``"int4"`` or ``"fp4"``, without zero
            points; or ``"float"``, to leave them.
        granularity: Whether activations have one scale per ``"token"`` or per ``"tensor"``.
        online: Linears before which `Rotate` will leave a Hadamard transform.
        ignore: Patterns on names of weights; a site that one of them reads stays as it is.

    Raises:
        RecipeError: The method or a format is unknown.
    """

    requires = frozenset({Fact.RAISED})
    numerics = Equivalent()
    objective: ClassVar[type[Objective]] = Objective
    """What the search minimizes."""

    def __init__(
        self,
        method: str = "smoothquant",
        *,
        strength: float | None = None,
        weights: str | Format = "int8",
        activations: str = "int8",
        granularity: Granularity = "token",
        online: Iterable[OnlineLinear] = (),
        ignore: Iterable[str] = (),
    ) -> None:
        if method not in RULES:
            raise RecipeError(
                f"unknown method '{method}' of smooth", remedy=f"known: {', '.join(RULES)}"
            )
        self._rule: ScaleRule = RULES[method]
        self._method = method
        self._strength = strength
        format = weights if isinstance(weights, Format) else parse_format(weights)
        rounded = None if activations == FLOAT else _format_of(activations)
        self._rounding = Rounding(format, rounded, granularity == "tensor")
        self._online = frozenset(online)
        self._ignore = tuple(ignore)

    def run(self, program: Program, context: Context) -> PassResult:
        """Chooses scales for every site, then absorbs them.

        Raises:
            DataError: There is no calibration data, or it does not fit.
        """
        result = PassResult()
        if self._method == "os+":
            self._centre(program, context, result)
        sites = [site for site in find_scale_sites(program) if self._is_wanted(site, result)]
        scale_sites = [site for site in sites if isinstance(site, ScaleSite)]
        found = self._measure(program, scale_sites, context)
        context.progress.stage("choose scales", len(scale_sites))
        for site in scale_sites:
            seen = _seen(program, site, found)
            scales, detail = self._choose(program, site, found, seen)
            absorb(program, site.site, [Diagonal(1 / scale) for scale in scales])
            result.rewrites += 1
            result.details.append(
                {"sources": site.site.sources, "sinks": site.site.sinks, **detail}
            )
            context.progress.advance(1, site.site.sinks[0])
        return result

    def _centre(self, program: Program, context: Context, result: PassResult) -> None:
        """Shifts channels by the middle of their range, where biases can take that up."""
        sites = list(find_shift_sites(program))
        requests = [Request(site.readers[0].value, ChannelRange) for site in sites]
        if not requests:
            return
        found = measure(program, requests, context, f"smooth (method '{self._method}')")
        for site in sites:
            seen = found.of(site.readers[0].value, ChannelRange)
            middle = ((seen.low + seen.high) / 2).to(torch.float64)
            by_block = dict(site.by_block(site.readers[0], middle))
            absorb(program, site.site, [Shift(-by_block[i]) for i in range(len(by_block))])
            result.rewrites += 1
            result.details.append(
                {"sources": site.site.sources, "sinks": site.site.sinks, "shifted": True}
            )

    def _is_wanted(self, site: ScaleSite | Skip, result: PassResult) -> bool:
        if isinstance(site, Skip):
            result.skips.append(site)
            return False
        if self._online and any(NORMED in reader.roles for reader in site.readers):
            result.skips.append(Skip(site.site.sinks[0], "rotating folds the gain in front of it"))
            return False
        ignored = [name for name in site.site.sinks if matches_any(self._ignore, name)]
        result.skips += [Skip(name, "its input is kept by the recipe") for name in ignored]
        return not ignored

    def _measure(
        self, program: Program, sites: Iterable[ScaleSite], context: Context
    ) -> Statistics:
        kinds: list[Callable[[], Statistic]] = [ChannelRange, ChannelMoments]
        if self._strength is None:
            kinds += [partial(Rows, every=16), partial(LargestRows, keep=_LARGEST_ROWS)]
        values = {reader.value: None for site in sites for reader in site.readers}
        requests = [Request(value, kind) for value in values for kind in kinds]
        return measure(program, requests, context, f"smooth (method '{self._method}')")

    def _choose(
        self,
        program: Program,
        site: ScaleSite,
        found: Statistics,
        seen: Sequence[Magnitudes],
    ) -> tuple[list[Tensor], dict[str, object]]:
        """The scales of each block, and what to report of them."""
        if self._strength is not None:
            return self._scales(seen, self._strength), {"strength": self._strength}
        samples = [self._samples(program, reader, found) for reader in site.readers]
        objective = self.objective(site, samples, self._rounding)
        none = [torch.ones_like(block.largest) for block in seen]
        unscaled = objective(none)
        tried = [
            (objective(scales), strength, scales)
            for strength in self._rule.strengths
            for scales in [self._scales(seen, strength)]
        ]
        error, strength, scales = min(tried, key=lambda item: item[:2])
        if unscaled <= error:
            return none, {"strength": None, "error": unscaled, "error_unscaled": unscaled}
        return scales, {"strength": strength, "error": error, "error_unscaled": unscaled}

    def _samples(self, program: Program, reader: Reader, found: Statistics) -> ReaderSamples:
        ordinary = _some(found.of(reader.value, Rows).values, _MOST_ROWS)
        rows = torch.cat((ordinary, found.of(reader.value, LargestRows).values))
        weight = program.weights.materialize(reader.weight).flatten(0, -2)
        largest = found.of(reader.value, ChannelRange).absmax
        rotation = None
        if self._online & reader.roles:
            rotation = random_hadamard(rows.shape[1], None, online=True).value
        return ReaderSamples(reader, _some(weight, _MOST_OUTPUTS), rows, largest, rotation)

    def _scales(self, seen: Sequence[Magnitudes], strength: float) -> list[Tensor]:
        return [
            self._rule.scale(block, strength).clamp(1 / _LARGEST_SCALE, _LARGEST_SCALE)
            for block in seen
        ]


def _format_of(name: str) -> ActivationFormat:
    """One format of activations that the search can round to.

    Raises:
        RecipeError: It is unknown, has zero points, or is a choice of several.
    """
    choice = parse_activation_format(name)
    format, *others = choice.candidates
    if others or format.has_zero_point:
        raise RecipeError(
            f"smooth cannot round activations to '{name}'",
            remedy="use one symmetric format, such as int8 or fp4, or 'float'",
        )
    return format


def _seen(program: Program, site: ScaleSite, found: Statistics) -> list[Magnitudes]:
    """The magnitudes of each block: the largest, or mean, over all that reads it."""
    zeros = torch.zeros(site.site.size, dtype=torch.float64)
    largest, mean, weights = ([zeros.clone() for _ in site.site.blocks] for _ in range(3))
    for reader in site.readers:
        weight = program.weights.materialize(reader.weight)
        statistics = (
            (largest, found.of(reader.value, ChannelRange).absmax),
            (mean, found.of(reader.value, ChannelMoments).mean_abs),
            (weights, weight.abs().flatten(0, -2).amax(0)),
        )
        for kept, per_channel in statistics:
            for block, part in site.by_block(reader, per_channel.to(torch.float64)):
                kept[block] = torch.maximum(kept[block], part)
    return [Magnitudes(*parts) for parts in zip(largest, mean, weights, strict=True)]


def _some(rows: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spaced."""
    return rows[:: max(1, -(-len(rows) // most))]
