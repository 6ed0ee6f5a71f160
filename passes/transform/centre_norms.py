"""Layer norms become root-mean-square norms, by centring what feeds them."""

from __future__ import annotations

from torch import Tensor

from qcompile.analysis.families import Family, PortRole
from qcompile.analysis.sites import Site, find_sites
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult


class CentreNorms(Pass):
    """``layer_norm(x)`` without gain and bias  =>  ``rms_norm(x)``, its sources centred.

    A layer norm is a root-mean-square norm of ``x - mean(x)``. Where all that reads the residual
    stream are bare layer norms, the mean can be taken out of every weight that writes to it.
    """

    requires = frozenset({Fact.GAINS_FOLDED})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Centres every site that needs it."""
        del context
        result = PassResult()
        editor = Editor(program)
        norms = {node.name: node for node in program.calls(dialect.layer_norm)}
        for site in find_sites(program):
            if not site.centred or Family.ORTHOGONAL not in site.families:
                continue
            if any(port.role is PortRole.GAIN for port in site.ports):
                continue
            _centre(program, site)
            for name in site.norms:
                if name in norms:
                    node = norms[name]
                    with editor.before(node):
                        bare = editor.call(dialect.rms_norm, node.args[0], None, node.args[3])
                        editor.replace(node, bare)
                    result.rewrites += 1
        return result


def _centre(program: Program, site: Site) -> None:
    for weight, axis in {(p.weight, p.axis) for p in site.ports if p.role is PortRole.SOURCE}:

        def function(value: Tensor, axis: int = axis) -> Tensor:
            return value - value.mean(axis, keepdim=True)

        program.weights.derive(
            weight,
            (weight,),
            function,
            program.weights.spec(weight),
            exact=False,
            label="centre",
        )
