"""Rotation, permutation, rotation: DuQuant fits transforms to the outliers of each input."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from qcompile.analysis.roles import weight_name
from qcompile.calibration.requests import Request, Statistics
from qcompile.calibration.statistics import Rows
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult
from qcompile.passes.measure import measure
from qcompile.passes.transform.greedy_rotation import greedy_rotation, zigzag
from qcompile.passes.transform.insert import insert_before
from qcompile.passes.transform.peak_rows import PeakRows, unit_rows
from qcompile.passes.transform.values import BlockDiagonal, Compose, Orthogonal, Permutation
from qcompile.passes.transform.wanted_inputs import wanted_inputs

_SAMPLED = 64
"""How many ordinary tokens a transform is fit to, beside as many of the worst."""


class Duquant(Pass):
    """Leaves a rotation in blocks, a permutation and a second rotation before linears.

    ::

        linear(x, W)   =>   linear(qc.transform(x, R P S), W R P S)

    R is chosen greedily on calibration data, on the worst tokens and some ordinary ones, each
    divided by its root mean square, since scales are per token: again and again, the channel that
    holds the largest magnitude is spread over its block. P deals channels to blocks by magnitude,
    back and forth, so that blocks are alike; S is chosen like R behind it. All blocks of an input
    share one matrix, so that a transform costs ``4 n block`` operations per token and ``2 block^2``
    numbers. Linears that read the same value share the transform. The linear that makes the logits
    stays as it is.

    The paper scales channels first (`smooth`), which is a step of its own. The result's details say
    ``input, weights, block_size, largest_before, largest_after``: magnitudes on these tokens.

    Args:
        block_size: Channels per block at most; the largest divisor of an input's channels up to
            this is taken.
        steps: Greedy steps to try for each rotation.
        ignore: Patterns on names of weights whose inputs stay as they are.
        seed: Added to the compilation's own, for the free part of rotations.

    Source: Lin et al. 2024 (DuQuant, arXiv 2406.01721).
    """

    requires = frozenset({Fact.RAISED})
    numerics = Equivalent()

    def __init__(
        self,
        block_size: int = 128,
        steps: int = 256,
        ignore: Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        self._block_size = block_size
        self._steps = steps
        self._ignore = tuple(ignore)
        self._seed = seed

    def run(self, program: Program, context: Context) -> PassResult:
        """Transforms every input of linears.

        Raises:
            DataError: There is no calibration data, or it does not fit.
        """
        groups, skips = wanted_inputs(program, self._ignore)
        result = PassResult(skips=skips)
        requests = [Request(value, kind) for value, _ in groups for kind in (PeakRows, Rows)]
        found = measure(program, requests, context, "DuQuant")
        generator = torch.Generator().manual_seed(context.seed + self._seed)
        context.progress.stage("fit rotations", len(groups))
        for value, linears in groups:
            rows = _typical_rows(found, value)
            transform = self.fit(rows, generator)
            insert_before(program, linears, transform)
            result.rewrites += 1
            result.details.append(
                {
                    "input": value.name,
                    "weights": [weight_name(linear) for linear in linears],
                    "block_size": self.block(transform.size),
                    "largest_before": float(rows.abs().max()),
                    "largest_after": float(transform.apply(rows).abs().max()),
                }
            )
            context.progress.advance(1, value.name)
        return result

    def fit(self, rows: Tensor, generator: torch.Generator) -> Compose:
        """The transform for an input, from some of its rows ``[T, n]``."""
        n = rows.shape[1]
        block = self.block(n)
        first = self._rotation(rows, block, generator)
        rows = first.apply(rows)
        permutation = Permutation(zigzag(rows.abs().amax(0), n // block))
        rows = permutation.apply(rows)
        return Compose((first, permutation, self._rotation(rows, block, generator)))

    def block(self, n: int) -> int:
        """Channels per block of an input with n channels."""
        return max(size for size in range(1, min(self._block_size, n) + 1) if n % size == 0)

    def _rotation(self, rows: Tensor, block: int, generator: torch.Generator) -> BlockDiagonal:
        matrix = greedy_rotation(rows, block, self._steps, generator)
        return BlockDiagonal((Orthogonal(matrix),) * (rows.shape[1] // block))


def _typical_rows(found: Statistics, value: fx.Node) -> Tensor:
    """The worst rows and some others, each of root mean square 1: float32 [T, n]."""
    worst, others = found.of(value, PeakRows).values, unit_rows(found.of(value, Rows).values)
    return torch.cat((worst, others[:: 1 + len(others) // _SAMPLED]))
