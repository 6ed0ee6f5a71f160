"""From a quantized program to one node per Triton kernel."""

from __future__ import annotations

from qcompile.backends.cuda.lower.fuse_quantized import FuseQuantized
from qcompile.backends.cuda.lower.round_operands import RoundOperands
from qcompile.passes.canonicalize.merge_duplicates import MergeDuplicates
from qcompile.passes.infra import Phase
from qcompile.passes.lower.limit_logits import LimitLogits
from qcompile.passes.lower.split_linears import SplitLinears


def lower_phase(rounding: str) -> Phase:
    """The passes that lower a program to the Triton kernels, in order.

    Args:
        rounding: What tensor cores multiply; see `RoundOperands`.
    """
    # LimitLogits knows the projection to the vocabulary while it is a plain linear.
    passes = (
        LimitLogits(),
        SplitLinears(),
        FuseQuantized(),
        MergeDuplicates(),
        RoundOperands(rounding),
    )
    return Phase("lower", passes)
