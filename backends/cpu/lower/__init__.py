"""From a quantized program to one node per kernel of the CPU library."""

from __future__ import annotations

from qcompile.backends.cpu import ops
from qcompile.backends.cpu.lower.fuse_attention import FuseAttention
from qcompile.backends.cpu.lower.fuse_linear import FuseLinear
from qcompile.backends.cpu.lower.fuse_residual import FuseResidual
from qcompile.backends.cpu.lower.fuse_siblings import FuseSiblings
from qcompile.passes.canonicalize.merge_duplicates import MergeDuplicates
from qcompile.passes.infra import Phase
from qcompile.passes.lower.limit_logits import LimitLogits
from qcompile.passes.lower.split_linears import SplitLinears


def lower_phase() -> Phase:
    """The passes that lower a program to the CPU library, in order."""
    return Phase(
        "lower",
        (
            SplitLinears(),
            FuseLinear(),
            FuseResidual(),
            FuseAttention(),
            MergeDuplicates(),
            LimitLogits(projections=(ops.linear,)),
            FuseSiblings(),
        ),
    )
