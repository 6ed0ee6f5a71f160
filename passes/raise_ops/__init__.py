"""From ATen to the dialect, by what a region computes."""

from __future__ import annotations

from qcompile.ir.program import Program
from qcompile.passes.canonicalize.merge_duplicates import MergeDuplicates
from qcompile.passes.canonicalize.normalize_moves import NormalizeMoves
from qcompile.passes.infra import Phase, run_passes
from qcompile.passes.raise_ops.own_cache import OwnCache
from qcompile.passes.raise_ops.raise_activations import RaiseActivations
from qcompile.passes.raise_ops.raise_attention import RaiseAttention
from qcompile.passes.raise_ops.raise_gates import RaiseGates
from qcompile.passes.raise_ops.raise_norms import RaiseNorms
from qcompile.passes.raise_ops.raise_rope import RaiseRope
from qcompile.passes.raise_ops.recognize_masks import RecognizeMasks
from qcompile.passes.raise_ops.settle import Settle


def raise_phase() -> Phase:
    """The passes that raise a canonical program, in order."""
    return Phase(
        "raise",
        (
            OwnCache(),
            RaiseNorms(),
            RaiseRope(),
            RaiseAttention(),
            RaiseActivations(),
            RaiseGates(),
            RecognizeMasks(),
            NormalizeMoves(),
            MergeDuplicates(),
            Settle(),
        ),
    )


def raise_program(program: Program) -> Program:
    """A canonical program in terms of the dialect."""
    return run_passes(program, raise_phase().passes)
