"""Gains and shifts of normalizations move into the layers that follow."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from qcompile.analysis.declarations.norms import gain_consumers, gain_offender
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult, Skip
from qcompile.passes.transform.bias import derive_bias
from qcompile.passes.transform.untie_weights import own_weight


class FoldNormGain(Pass):
    """Makes normalizations bare.

    ``linear(rms_norm(x, g), W)``         =>  ``linear(rms_norm(x), W * g)``
    ``linear(layer_norm(x, g, b), W, c)`` =>  ``linear(layer_norm(x), W * g, c + W b)``

    A norm is folded into *all* of its consumers (linears and routed experts) or into none; one that
    feeds anything else (a residual, another norm) stays, with the reason. A weight that has other
    users is untied; the result's details say what the copy takes: ``weight, copy, extra_bits``.
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
            vectors = [n for n in _gain_and_shift(node) if n is not None]
            if not vectors:
                continue
            offender = _offender(node)
            if offender is not None:
                result.skips.append(Skip(node.name, f"the norm's gain feeds {offender}"))
                continue
            result.details += _fold(program, editor, node)
            result.rewrites += 1
        return result


def _gain_and_shift(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    gain = node.args[1]
    shift = node.args[2] if node.target is dialect.layer_norm else None
    return (
        gain if isinstance(gain, fx.Node) else None,
        shift if isinstance(shift, fx.Node) else None,
    )


def _offender(node: fx.Node) -> str | None:
    """What keeps a norm from being folded, or None."""
    offender = gain_offender(node)
    gain, shift = _gain_and_shift(node)
    if offender is None and any(v is not None and v.op != "get_attr" for v in (gain, shift)):
        offender = "nothing that it could be folded into: it is computed"
    return offender


def _fold(program: Program, editor: Editor, node: fx.Node) -> list[dict[str, Any]]:
    """Folds one norm; what was untied for it."""
    gain, shift = _gain_and_shift(node)
    untied = []
    for layer in gain_consumers(node)[0]:
        weight = layer.args[3 if _is_experts(layer) else 1]
        assert isinstance(weight, fx.Node)
        name, is_copy = own_weight(program, str(weight.target), layer)
        if is_copy:
            bits = program.weights.spec(name).bytes * 8
            untied.append({"weight": str(weight.target), "copy": name, "extra_bits": bits})
        if shift is not None:
            _add_shift(program, layer, name, str(shift.target))
        if gain is not None:
            program.weights.derive(
                name,
                (name, str(gain.target)),
                lambda weight, gain: weight * gain,
                program.weights.spec(name),
                exact=False,
                label="fold_gain",
            )
    is_layer_norm = node.target is dialect.layer_norm
    bare = (node.args[0], None, *((None,) if is_layer_norm else ()), node.args[-1])
    with editor.before(node):
        editor.replace(node, editor.call(node.target, *bare))
    return untied


def _is_experts(node: fx.Node) -> bool:
    return node.target is dialect.experts


def _add_shift(program: Program, linear: fx.Node, weight: str, shift: str) -> None:
    """``c + W b`` with the weight as it is before the gain is folded into it."""

    def function(bias: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        return bias + weight @ shift

    derive_bias(program, linear, (weight, shift), function, "fold_shift")
