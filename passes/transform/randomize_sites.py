"""A random legal transform on every site: the standing test of the algebra."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.analysis.families import Family
from qcompile.analysis.sites import Site, find_sites
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult, run_passes
from qcompile.passes.transform.absorb import absorb
from qcompile.passes.transform.centre_norms import CentreNorms
from qcompile.passes.transform.fold_norm_gain import FoldNormGain
from qcompile.passes.transform.untie_weights import UntieWeights
from qcompile.passes.transform.values import (
    Diagonal,
    Permutation,
    Shift,
    Transform,
    random_orthogonal,
)

_LARGEST_SCALE = 4.0


class RandomizeSites(Pass):
    """Absorbs random transforms of some families at every site where they are legal.

    Args:
        families: Which families.
        seed: For the values.
    """

    requires = frozenset({Fact.RAISED})
    numerics = Equivalent()

    def __init__(self, families: frozenset[Family], seed: int = 0) -> None:
        self.families = families
        self.seed = seed

    def run(self, program: Program, context: Context) -> PassResult:
        """One transform per site, family and block."""
        del context
        result = PassResult()
        generator = torch.Generator().manual_seed(self.seed)
        for family in sorted(self.families, key=lambda family: family.value):
            # A shift makes biases, which later transforms must see.
            for site in find_sites(program):
                if family not in site.families:
                    continue
                values = [random_transform(site, family, generator) for _ in site.blocks]
                absorb(program, site, values)
                result.rewrites += 1
        return result


def randomize_sites(program: Program, seed: int = 0) -> Program:
    """The program with a random legal transform on every site; it computes the same function.

    Permutations, scales and shifts come first, then gains are folded and layer norms centred, so
    that the residual stream can be rotated as well.

    Args:
        program: In raised form, not quantized; it is not changed.
        seed: For the values.
    """
    return run_passes(
        program,
        [
            UntieWeights(),
            RandomizeSites(frozenset({Family.PERMUTATION, Family.DIAGONAL, Family.SHIFT}), seed),
            FoldNormGain(),
            CentreNorms(),
            RandomizeSites(frozenset({Family.ORTHOGONAL}), seed + 1),
        ],
    )


def random_transform(site: Site, family: Family, generator: torch.Generator) -> Transform:
    """A random value of a family for one block of a site, well conditioned."""
    n = site.size
    match family:
        case Family.PERMUTATION:
            return Permutation(torch.randperm(n, generator=generator))
        case Family.DIAGONAL:
            return Diagonal(_paired(site, _scales(n, generator)))
        case Family.SHIFT:
            return Shift(torch.randn(n, generator=generator, dtype=torch.float64))
        case Family.ORTHOGONAL:
            return random_orthogonal(n, generator)


def _scales(n: int, generator: torch.Generator) -> Tensor:
    """Log-uniform in ``1/4 .. 4``."""
    exponent = 2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1
    return _LARGEST_SCALE**exponent


def _paired(site: Site, scale: Tensor) -> Tensor:
    """The same scale on both channels of every plane that a rotary embedding turns."""
    if site.planes is None:
        return scale
    pairs, interleaved = site.planes
    scale = scale.clone()
    if interleaved:
        scale[1 : 2 * pairs : 2] = scale[0 : 2 * pairs : 2]
    else:
        scale[pairs : 2 * pairs] = scale[:pairs]
    return scale
