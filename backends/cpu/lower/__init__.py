"""From a quantized program to one node per kernel of the CPU library."""

from __future__ import annotations

from qcompile.backends.cpu import ops
from qcompile.backends.cpu.cached_attention import cached_attention, caches_of
from qcompile.backends.cpu.lower.fuse_attention import FuseAttention
from qcompile.backends.cpu.lower.fuse_experts import FuseExperts
from qcompile.backends.cpu.lower.fuse_linear import FuseLinear
from qcompile.backends.cpu.lower.fuse_residual import FuseResidual
from qcompile.backends.cpu.lower.fuse_siblings import FuseSiblings
from qcompile.backends.cpu.sparse_linear import FuseSparseLinear
from qcompile.backends.cpu.vector_linear import FuseVectorLinear, vector_linear
from qcompile.passes.canonicalize.merge_duplicates import MergeDuplicates
from qcompile.passes.infra import Phase
from qcompile.passes.lower.limit_logits import LimitLogits
from qcompile.passes.lower.split_linears import SplitLinears
from qcompile.passes.lower.store_caches import StoreCaches
from qcompile.passes.lower.turn_inputs import TurnInputs


def lower_phase() -> Phase:
    """The passes that lower a program to the CPU library, in order."""
    return Phase(
        "lower",
        (
            FuseSparseLinear(),
            SplitLinears(),
            TurnInputs(),
            FuseVectorLinear(),
            FuseLinear(),
            FuseExperts(),
            FuseResidual(),
            FuseAttention(),
            MergeDuplicates(),
            LimitLogits(projections=(ops.linear, vector_linear)),
            FuseSiblings(),
        ),
    )


def store_phase() -> Phase:
    """What gives caches of few bits their bytes, behind all that is checked."""
    return Phase("store caches", (StoreCaches({cached_attention: caches_of}),))
