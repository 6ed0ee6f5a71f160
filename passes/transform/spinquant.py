"""Rotations that are learned: SpinQuant."""

from __future__ import annotations

import torch

from qcompile.analysis.families import Family
from qcompile.analysis.sites import Site
from qcompile.formats import parse_format
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult, Skip
from qcompile.passes.quantize.policy import FLOAT
from qcompile.passes.transform.absorb import absorb
from qcompile.passes.transform.rotate import rotation_sites
from qcompile.passes.transform.values import Orthogonal, random_hadamard
from qcompile.passes.tune.rotation_training import TrainingPlan, train_rotations


class Spinquant(Pass):
    """Rotates the residual stream and the values of each layer by matrices that are learned.

    They start as randomized Hadamard matrices and go down the next-token loss of the model with
    activations rounded per token: gradients run through the program itself, and steps stay on the
    manifold of rotations. All rotations go into weights. These are left as they are in training,
    for a method behind it that makes up for their rounding; name their format where they will be
    rounded to the nearest.

    Train behind a `rotate` step that only leaves online Hadamard transforms, so that the loss is
    that of the model as it will run. The result's details say ``place, weights, rotation`` per
    site, then ``loss_before`` and ``loss_after`` in nats per token on the first micro-batches.

    Args:
        bits: Width that activations are rounded to in training.
        weights: A format that weights of linears are rounded to in training, or ``"float"``.
        steps: Steps of one micro-batch each.
        rate: The largest step at the start.
        batch_tokens: Tokens per micro-batch; a window is not cut.
        seed: Added to the compilation's own, for the start.

    Source: Liu et al. 2024 (SpinQuant, arXiv 2405.16406).
    """

    requires = frozenset({Fact.GAINS_FOLDED})
    numerics = Equivalent()

    def __init__(
        self,
        bits: int = 4,
        weights: str = FLOAT,
        steps: int = 100,
        rate: float = 1.5,
        batch_tokens: int = 2048,
        seed: int = 0,
    ) -> None:
        rounded = None if weights == FLOAT else parse_format(weights)
        self._plan = TrainingPlan(bits, rounded, steps, rate)
        self._batch_tokens = batch_tokens
        self._seed = seed

    def run(self, program: Program, context: Context) -> PassResult:
        """Trains rotations of all sites together and absorbs them.

        Raises:
            DataError: There is no calibration data, or it does not fit.
            ModelError: The program does not map tokens to logits.
        """
        result = PassResult()
        sites = [(place, site) for place, site in rotation_sites(program) if _legal(site, result)]
        if not sites:
            return result
        data = context.calibration.inputs(program, "SpinQuant")
        generator = torch.Generator().manual_seed(context.seed + self._seed)
        start = [random_hadamard(site.size, generator, online=False).value for _, site in sites]
        trained = train_rotations(
            program,
            [site for _, site in sites],
            [value.matrix() for value in start],
            data.batches(program, self._batch_tokens),
            self._plan,
            context.progress,
        )
        for (place, site), rotation in zip(sites, trained.rotations, strict=True):
            absorb(program, site, [Orthogonal(rotation)] * len(site.blocks))
            result.rewrites += 1
            result.details.append(
                {
                    "place": place,
                    "weights": [*site.sources, *site.sinks],
                    "rotation": f"a trained matrix for {site.size} channels",
                }
            )
        result.details.append({"loss_before": trained.before, "loss_after": trained.after})
        return result


def _legal(site: Site, result: PassResult) -> bool:
    if Family.ORTHOGONAL in site.families:
        return True
    reasons = [b.reason for b in site.blockers if b.family is Family.ORTHOGONAL]
    result.skips.append(Skip(site.sources[0], "; ".join(dict.fromkeys(reasons))))
    return False
