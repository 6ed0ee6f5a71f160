"""Weights without outliers, by random rotations of both of their sides: QuIP."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from qcompile.analysis.roles import weight_name
from qcompile.calibration.requests import Request
from qcompile.calibration.statistics import ChannelMoments
from qcompile.errors import RecipeError
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult
from qcompile.passes.measure import measure
from qcompile.passes.transform.insert import insert_after, insert_before
from qcompile.passes.transform.untie_weights import own_weight
from qcompile.passes.transform.values import (
    BlockDiagonal,
    Compose,
    Diagonal,
    Permutation,
    Transform,
    random_hadamard,
    random_orthogonal,
)
from qcompile.passes.transform.wanted_inputs import WantedInput, wanted_inputs

RotationKind = Literal["hadamard", "kronecker"]
"""A randomized Hadamard transform, or the Kronecker product of two random orthogonal matrices."""

_LEAST = 1e-8
"""Of a channel's mean square over the mean of all: channels that are never used are not scaled."""


class Quip(Pass):
    """Leaves random rotations before and behind linears, which make their weights incoherent.

    ::

        linear(x, W, b)   =>   qc.transform(linear(qc.transform(x, D^-1 V), U^T W D V, b U), U^T)

    U and V are random, so that no entry of a weight stands out, whatever it was; D balances the
    channels of inputs and weight, ``(E x_i^2 / |W_i|^2)^(1/4)``. Linears that read the same value
    share D and V. The linear that makes the logits stays as it is. Quantize with ``gptq``, which is
    the paper's LDLQ.

    The result's details say ``weight, incoherence_before, incoherence_after``: of a weight
    ``[N, K]``, ``max|W| sqrt(N K) / |W|_F``.

    Args:
        rotation: What U and V are.
        rescale: Whether to scale by D, which takes calibration data.
        ignore: Patterns on names of weights that stay as they are.
        seed: Added to the compilation's own.

    Raises:
        RecipeError: The kind of rotation is unknown.

    Source: Chee et al. 2023 (QuIP, arXiv 2307.13304), section 4; Hadamard transforms: Tseng et al.
    2024 (QuIP#, arXiv 2402.04396).
    """

    requires = frozenset({Fact.RAISED})
    numerics = Equivalent()

    def __init__(
        self,
        rotation: RotationKind = "hadamard",
        rescale: bool = True,
        ignore: Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        if rotation not in ("hadamard", "kronecker"):
            raise RecipeError(
                f"quip knows no rotation '{rotation}'", remedy="known: hadamard, kronecker"
            )
        self._rotation = rotation
        self._rescale = rescale
        self._ignore = tuple(ignore)
        self._seed = seed

    def run(self, program: Program, context: Context) -> PassResult:
        """Transforms both sides of every linear.

        Raises:
            DataError: Channels are to be scaled, and there is no calibration data.
        """
        groups, skips = wanted_inputs(program, self._ignore)
        result = PassResult(skips=skips)
        for linear in (linear for _, linears in groups for linear in linears):
            own_weight(program, weight_name(linear), linear)
        generator = torch.Generator().manual_seed(context.seed + self._seed)
        scales = self._scales(program, groups, context) if self._rescale else {}
        context.progress.stage("rotate weights", len(groups))
        for x, linears in groups:
            before = [incoherence(_materialized(program, linear)) for linear in linears]
            inside = self._random(int(x.meta["val"].shape[-1]), generator)
            if x in scales:
                inside = Compose((Diagonal(1 / scales[x]), inside))
            insert_before(program, linears, inside)
            for linear in linears:
                outside = self._random(int(linear.meta["val"].shape[-1]), generator)
                insert_after(program, linear, outside)
            for linear, mu in zip(linears, before, strict=True):
                result.rewrites += 1
                result.details.append(
                    {
                        "weight": weight_name(linear),
                        "incoherence_before": mu,
                        "incoherence_after": incoherence(_materialized(program, linear)),
                    }
                )
            context.progress.advance(1, x.name)
        return result

    def _scales(
        self, program: Program, groups: Sequence[WantedInput], context: Context
    ) -> dict[fx.Node, Tensor]:
        """D for each input, ``[K]`` float64, of geometric mean 1."""
        found = measure(program, [Request(x, ChannelMoments) for x, _ in groups], context, "QuIP")
        scales = {}
        for x, linears in groups:
            energy = sum(_materialized(program, linear).square().sum(0) for linear in linears)
            assert isinstance(energy, Tensor)
            inputs = found.of(x, ChannelMoments).second_moment
            scale = (_floored(inputs) / _floored(energy)) ** 0.25
            scales[x] = scale / scale.log().mean().exp()
        return scales

    def _random(self, n: int, generator: torch.Generator) -> Transform:
        if self._rotation == "hadamard":
            return random_hadamard(n, generator, online=True).value
        return random_kronecker(n, generator)


def random_kronecker(n: int, generator: torch.Generator) -> Compose:
    """A random permutation, then the Kronecker product of two random orthogonal matrices.

    Their orders are the divisors of n nearest to its root. The result's channels are in the order
    of the second factor, which makes no difference to a random matrix and saves moving them.
    """
    rows = max(size for size in range(1, math.isqrt(n) + 1) if n % size == 0)
    columns = n // rows
    across, along = (random_orthogonal(size, generator) for size in (columns, rows))
    return Compose(
        (
            Permutation(torch.randperm(n, generator=generator)),
            BlockDiagonal((across,) * rows),
            Permutation(torch.arange(n).reshape(rows, columns).T.reshape(-1)),
            BlockDiagonal((along,) * columns),
        )
    )


def incoherence(weight: Tensor) -> float:
    """``max|W| sqrt(N K) / |W|_F`` of a weight ``[N, K]``: 1 at least, ``sqrt(N K)`` at most."""
    size = float(weight.square().sum().sqrt())
    return float(weight.abs().max()) * weight.numel() ** 0.5 / size if size else 1.0


def _floored(values: Tensor) -> Tensor:
    return values.clamp(min=max(_LEAST * float(values.mean()), torch.finfo(torch.float64).tiny))


def _materialized(program: Program, linear: fx.Node) -> Tensor:
    return program.weights.materialize(weight_name(linear), torch.float64)
