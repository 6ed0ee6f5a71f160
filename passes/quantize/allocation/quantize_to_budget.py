"""`quantize_weights` under a budget: every weight gets the format that serves the whole best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from qcompile.errors import RecipeError
from qcompile.formats import Format, ScaleSearch
from qcompile.formats.rtn import rtn
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Lossy, Numerics, Pass, PassResult
from qcompile.passes.quantize.allocation.choose import choose
from qcompile.passes.quantize.allocation.plan import (
    Budget,
    as_overrides,
    candidate_formats,
    open_weights,
)
from qcompile.passes.quantize.allocation.probe import Change, perplexity_factor
from qcompile.passes.quantize.allocation.sensitivity import Sensitivities, measure_sensitivities
from qcompile.passes.quantize.layers import layer_weights
from qcompile.passes.quantize.policy import FormatPolicy, Override
from qcompile.passes.quantize.quantize_weights import QuantizeWeights

SENSITIVITY_TOKENS = 1024
"""Of the calibration data: sensitivities are means over all positions, and need no more."""

_SAMPLED_ROWS = 256
"""Rows of a weight whose rounding errors stand for all of them."""


@dataclass(frozen=True)
class Allocation:
    """Formats that were chosen for weights.

    Attributes:
        formats: By the name of the weight.
        bits: Stored per weight.
        predicted: The divergence from the float program that they will cause: the sum of slope
            times squared relative error of rounding to nearest.
        share: The same for each weight.
    """

    formats: dict[str, Format]
    bits: float
    predicted: float
    share: dict[str, float]


def allocate(
    slopes: Mapping[str, float],
    read: Callable[[str], Tensor],
    candidates: Sequence[Format],
    budget: float,
    *,
    scale_search: ScaleSearch = "absmax",
) -> Allocation:
    """The formats of least predicted divergence within a budget.

    Args:
        slopes: Divergence per squared relative error of each weight, by name.
        read: A weight by its name; one at a time is held.
        candidates: Any formats.
        budget: Bits for all weights together.
        scale_search: How scales will be chosen.

    Raises:
        RecipeError: The smallest candidates take more.
    """
    costs, losses, total = [], [], 0
    for name, slope in slopes.items():
        weight = read(name)
        total += weight.numel()
        costs.append([c.stored_bits(tuple(weight.shape)) for c in candidates])
        errors = (squared_error(weight, c, scale_search, name) for c in candidates)
        losses.append([slope * error for error in errors])
    try:
        chosen = choose(costs, losses, math.floor(budget))
    except ValueError as error:
        least = sum(map(min, costs))
        raise RecipeError(
            f"{budget / total:.3f} bits per weight are less than the smallest candidates take: "
            f"{least / total:.3f} ({', '.join(map(str, candidates))})",
            remedy="raise the budget, or name candidates of fewer bits",
        ) from error
    picked = list(zip(slopes, chosen, costs, losses, strict=True))
    share = {name: loss[index] for name, index, _, loss in picked}
    return Allocation(
        {name: candidates[index] for name, index, _, _ in picked},
        sum(cost[index] for _, index, cost, _ in picked) / total,
        math.fsum(share.values()),
        share,
    )


def squared_error(weight: Tensor, format: Format, scale_search: ScaleSearch, name: str) -> float:
    """The squared relative error of rounding to nearest, on some rows that stand for all."""
    rows = weight.reshape(-1, weight.shape[-1])
    step = max(1, len(rows) // _SAMPLED_ROWS)
    sampled = rows[::step].contiguous()
    return rtn(sampled, format, scale_search=scale_search, name=name).relative_error ** 2


class QuantizeToBudget(Pass):
    """Measures sensitivities, chooses formats, and quantizes.

    Formats are chosen for the linears that the recipe gives its common format: not for what it
    ignores or names in overrides, nor for embedding and lm_head. The program gets a note that puts
    the predicted increase of perplexity beside the measured one; each weight's record says its
    ``sensitivity`` and its ``predicted_divergence``.

    Args:
        format: As for `QuantizeWeights`; candidates are of its kind unless given.
        budget: Bits per weight or bytes.
        candidates: Formats, or their names, to choose from.
        ignore: As for `QuantizeWeights`.
        embedding: The same.
        lm_head: The same.
        overrides: The same.
        scale_search: The same; candidates are judged by it.
        **options: The others of `QuantizeWeights`.

    Raises:
        RecipeError: A format, the method or one of its options is unknown.
    """

    requires: ClassVar[frozenset[Fact]] = QuantizeWeights.requires
    ensures: ClassVar[frozenset[Fact]] = QuantizeWeights.ensures
    numerics: ClassVar[Numerics] = Lossy()

    def __init__(
        self,
        format: str | Format,
        budget: Budget,
        candidates: Iterable[str | Format] = (),
        *,
        ignore: Iterable[str] = (),
        embedding: str | Format | None = None,
        lm_head: str | Format | None = None,
        overrides: Iterable[Override | Mapping[str, str]] = (),
        scale_search: ScaleSearch = "absmax",
        **options: Any,
    ) -> None:
        self._budget = budget
        self._candidates = candidate_formats(format, candidates)
        self._ignore, self._overrides = tuple(ignore), tuple(overrides)
        self._scale_search: ScaleSearch = scale_search
        self._policy = FormatPolicy.of(
            format, embedding=embedding, lm_head=lm_head, ignore=ignore, overrides=overrides
        )
        self._quantize = partial(
            QuantizeWeights,
            format,
            ignore=self._ignore,
            embedding=embedding,
            lm_head=lm_head,
            scale_search=scale_search,
            **options,
        )
        self._quantize(overrides=self._overrides)  # what is wrong with the options is said now

    @property
    def name(self) -> str:
        """That of the pass that it stands in for."""
        return "quantize_weights"

    def run(self, program: Program, context: Context) -> PassResult:
        """Chooses and quantizes.

        Raises:
            RecipeError: The budget is too small, or a tied weight is given two formats.
            DataError: There is no calibration data.
            ModelError: A weight is not finite, or out of its format's reach; names it.
        """
        weights = open_weights(layer_weights(program)[0], self._ignore, self._overrides)
        names = [weight.name for weight in weights]
        if not names:
            return self._quantize(overrides=self._overrides).run(program, context)
        found, probe = measure_sensitivities(
            program, names, context.calibration, SENSITIVITY_TOKENS, context.progress
        )
        probe.release()
        allocation = allocate(
            found.slopes,
            lambda name: program.weights.materialize(name, torch.float32),
            self._candidates,
            self._budget.total(program, names, self._policy),
            scale_search=self._scale_search,
        )
        chosen = as_overrides(allocation.formats)
        result = self._quantize(overrides=[*chosen, *self._overrides]).run(program, context)
        program.notes += (self._note(allocation, found, probe.change_to(program)),)
        for record in result.details:
            name = str(record["weight"])
            if name in allocation.share:
                record["sensitivity"] = found.slopes[name]
                record["predicted_divergence"] = allocation.share[name]
        return result

    def _note(self, allocation: Allocation, found: Sensitivities, measured: Change) -> str:
        predicted = found.surprise(allocation.predicted)
        parts = [
            f"formats chosen for {self._budget}: {allocation.bits:.3f} bits per weight",
            f"divergence from the float model: predicted {allocation.predicted:.4f}, "
            f"measured {measured.divergence:.4f}",
        ]
        if predicted is not None and measured.surprise is not None:
            parts.append(
                f"perplexity: predicted {_percent(predicted)}, "
                f"measured {_percent(measured.surprise)}"
            )
        return f"{'; '.join(parts)} (on {found.description})"


def _percent(nats: float) -> str:
    return f"{100 * (perplexity_factor(nats) - 1):+.1f} %"


def quantize_weights(
    format: str | Format,
    *,
    target_bits: float | None = None,
    target_size: int | str | None = None,
    candidates: Iterable[str | Format] = (),
    **options: Any,
) -> Pass:
    """The pass behind the step `quantize_weights`: with a budget, or without.

    Args:
        format: As for `QuantizeWeights`.
        target_bits: As for `Budget`.
        target_size: Bytes, or such as ``"80MiB"``; as for `Budget`.
        candidates: As for `QuantizeToBudget`.
        **options: Of `QuantizeWeights`.
    """
    budget = Budget.of(target_bits, target_size)
    if budget is None:
        return QuantizeWeights(format, **options)
    return QuantizeToBudget(format, budget, candidates, **options)
