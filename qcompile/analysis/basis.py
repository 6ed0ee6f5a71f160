"""The bases of a whole program: one walk, one declaration per operator.

An operator without a declaration blocks every feature axis that it touches, so what is unknown is
never transformed.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from qcompile.analysis.declarations import DECLARATIONS
from qcompile.analysis.features import BasisMap, is_size
from qcompile.ir.program import Program
from qcompile.ir.text import format_target
from qcompile.ir.types import Role


def map_bases(program: Program) -> BasisMap:
    """Walks a raised program once and declares every operator."""
    bases = BasisMap()
    for node in program.graph.nodes:
        if node.op == "call_function" and not is_size(node):
            _visit(bases, node)
    for port, result in zip(program.signature.outputs, program.results, strict=True):
        if port.role not in (Role.PRESENT_KEY, Role.PRESENT_VALUE):
            bases.block_all(result, f"it is the output '{port.name}'")
    return bases


def _visit(bases: BasisMap, node: fx.Node) -> None:
    declare = DECLARATIONS.get(node.target)
    handled: Iterable[fx.Node] = declare(bases, node) if declare is not None else ()
    done = set(handled)
    for operand in node.all_input_nodes:
        if operand not in done and operand.op != "get_attr":
            bases.block_all(operand, f"{format_target(node.target)} needs it as it is")
