"""Gains and shifts of normalizations move into the layers that follow."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qcompile.analysis.declarations.norms import gain_offender
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.ir.weights import TensorSpec
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult, Skip
from qcompile.passes.transform.untie_weights import untie

aten = torch.ops.aten


class FoldNormGain(Pass):
    """Makes normalizations bare.

    ``linear(rms_norm(x, g), W)``         =>  ``linear(rms_norm(x), W * g)``
    ``linear(layer_norm(x, g, b), W, c)`` =>  ``linear(layer_norm(x), W * g, c + W b)``

    A norm is folded into *all* of its consumers or into none; one that feeds anything but linears
    (a residual, another norm) stays, with the reason. A weight that has other users is untied.
    """

    requires = frozenset({Fact.RAISED})
    ensures = frozenset({Fact.GAINS_FOLDED})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Folds every norm that can be folded."""
        del context
        result = PassResult()
        editor = Editor(program)
        for node in program.calls(dialect.rms_norm, dialect.layer_norm):
            vectors = [n for n in node.args[1:3] if isinstance(n, fx.Node)]
            if not vectors:
                continue
            offender = gain_offender(node)
            if offender is None and any(u.target is dialect.experts for u in node.users):
                offender = "routed experts"
            if offender is None and any(vector.op != "get_attr" for vector in vectors):
                offender = "a gain that is computed"
            if offender is not None:
                result.skips.append(Skip(node.name, f"the norm's gain feeds {offender}"))
                continue
            _fold(program, editor, node)
            result.rewrites += 1
        return result


def _fold(program: Program, editor: Editor, node: fx.Node) -> None:
    is_layer_norm = node.target is dialect.layer_norm
    gain = node.args[1]
    shift = node.args[2] if is_layer_norm else None
    for linear in list(node.users):
        name = _own_weight(program, linear)
        if isinstance(shift, fx.Node):
            _add_shift(program, editor, linear, name, str(shift.target))
        if isinstance(gain, fx.Node):
            spec = program.weights.spec(name)
            program.weights.derive(
                name,
                (name, str(gain.target)),
                lambda weight, gain: weight * gain,
                spec,
                exact=False,
                label="fold_gain",
            )
    bare = (node.args[0], None, *((None,) if is_layer_norm else ()), node.args[-1])
    with editor.before(node):
        editor.replace(node, editor.call(node.target, *bare))


def _own_weight(program: Program, linear: fx.Node) -> str:
    """The name of a linear's weight, which nothing else uses afterwards."""
    weight = linear.args[1]
    assert isinstance(weight, fx.Node)
    name = str(weight.target)
    users = [u for n in program.parameters() if n.target == name for u in n.users]
    return name if users == [linear] else untie(program, name, [linear])


def _add_shift(program: Program, editor: Editor, linear: fx.Node, weight: str, shift: str) -> None:
    """``c + W b`` with the weight as it is before the gain is folded into it."""
    bias = linear.args[2] if len(linear.args) > 2 else None
    operands = (weight, shift) + ((str(bias.target),) if isinstance(bias, fx.Node) else ())

    def function(weight: Tensor, shift: Tensor, bias: Tensor | None = None) -> Tensor:
        product = weight @ shift
        return product if bias is None else product + bias

    rows = program.weights.spec(weight).shape[0]
    name = f"{weight}_shift"
    spec = TensorSpec((rows,), torch.float32)
    program.weights.derive(name, operands, function, spec, exact=False, label="fold_shift")
    with editor.before(linear):
        linear.args = (*linear.args[:2], editor.weight(name))
