"""One spelling per meaning, so that later passes meet each construct once."""

from __future__ import annotations

from qcompile.ir.program import Program
from qcompile.passes.canonicalize.drop_no_ops import DropNoOps
from qcompile.passes.canonicalize.fold_parameters import FoldParameters
from qcompile.passes.canonicalize.join_parts import JoinParts
from qcompile.passes.canonicalize.merge_duplicates import MergeDuplicates
from qcompile.passes.canonicalize.merge_sizes import MergeSizes
from qcompile.passes.canonicalize.normalize_linear import NormalizeLinear
from qcompile.passes.canonicalize.normalize_moves import NormalizeMoves
from qcompile.passes.infra import Phase, run_passes


def canonicalize_phase() -> Phase:
    """The passes that make a captured program canonical, in order."""
    return Phase(
        "canonicalize",
        (
            DropNoOps(),
            MergeSizes(),
            MergeDuplicates(),
            NormalizeMoves(),
            JoinParts(),
            NormalizeLinear(),
            FoldParameters(),
            DropNoOps(),
        ),
    )


def canonicalize(program: Program) -> Program:
    """A captured program in canonical form."""
    return run_passes(program, canonicalize_phase().passes)
