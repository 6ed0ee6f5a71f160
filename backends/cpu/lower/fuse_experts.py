"""Quantized experts become one node, over packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from qcompile.backends.cpu import activations, expert_ops
from qcompile.backends.cpu.lower.fuse_linear import measured
from qcompile.backends.cpu.lower.pack_weight import PackedWeight, pack_weight
from qcompile.formats import stored_weight
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult
from qcompile.passes.lower.rounded_inputs import RoundedInput, rounded_input


class FuseExperts(Pass):
    """Matches the library's kernel for routed experts.

    1. ``experts(x, index, weight, dequantize(U), b, dequantize(D), c, ...)``  =>
       ``cpu_experts(x, index, weight, packed U, b, packed D, c, ..., act="float")``
    2. ``expert_output(h, index, weight, dequantize(D), c)`` with
       ``h = expert_hidden(x, index, dequantize(U), b, ...)``, where `x` and `h` are rounded by
       ``dequantize(quantize(.))``, one scale per token or per group of the weight  =>  the same
       with ``act="int8_token"`` or ``"int8_group"``, or those of fewer bits

    The kernel reads the matrices of the experts that tokens are routed to, and no others. Experts
    of which one matrix is float, or whose inputs are rounded in another way, are left to standard
    operators.
    """

    requires = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites all experts whose weights are both quantized.

        Raises:
            TargetError: The kernels cannot read a format.
        """
        del context
        result = PassResult()
        editor = Editor(program)
        for call in list(program.calls(dialect.experts, dialect.expert_output)):
            experts = _whole(call) if call.target is dialect.experts else _joined(call)
            if experts is None:
                continue
            with editor.before(call):
                fused = _fused(editor, experts)
            if fused is not None:
                editor.replace(call, fused)
                result.rewrites += 1
        return result


@dataclass(frozen=True)
class _Experts:
    """Routed experts in one or two nodes.

    Attributes:
        operands: Those of `qc.experts`: x, index, weight, up, its bias, down, its bias.
        gate: What stands between the products.
        rounded: How what the two products read is rounded; empty where it is not.
    """

    operands: tuple[Any, ...]
    gate: tuple[Any, ...]
    rounded: tuple[RoundedInput, ...] = ()


def _whole(call: fx.Node) -> _Experts:
    return _Experts(call.args[:7], call.args[7:])


def _joined(output: fx.Node) -> _Experts | None:
    """The halves of experts that both read rounded values."""
    read, index, weight, down, down_bias = output.args
    inner = rounded_input(read)
    if inner is None or inner.source.target is not dialect.expert_hidden:
        return None
    x, same_index, up, up_bias, *gate = inner.source.args
    outer = rounded_input(x)
    if outer is None or same_index is not index:
        return None
    operands = (outer.source, index, weight, up, up_bias, down, down_bias)
    return _Experts(operands, tuple(gate), (outer, inner))


def _fused(editor: Editor, experts: _Experts) -> fx.Node | None:
    x, index, weight, up, up_bias, down, down_bias = experts.operands
    stored = [found for node in (up, down) if (found := stored_weight(node)) is not None]
    if len(stored) < 2:
        return None
    packed = [pack_weight(editor, one) for one in stored]
    act = _act(experts.rounded, packed)
    if act is None:
        return None
    operands = (x, index, weight, packed[0].node, up_bias, packed[1].node, down_bias)
    layouts = [str(one.layout) for one in packed]
    return editor.call(
        expert_ops.experts, *operands, *packed[0].shape, *layouts, *experts.gate, act
    )


def _act(rounded: Sequence[RoundedInput], packed: Sequence[PackedWeight]) -> str | None:
    """How the kernel rounds what both products read; None if it does not do so."""
    if not rounded:
        return activations.FLOAT
    layouts = [one.layout for one in packed]
    if not all(layout.multiplies_bytes for layout in layouts):
        return None
    acts = [measured(x, layout.group_size) for x, layout in zip(rounded, layouts, strict=True)]
    # One group per row is a scale per token, by either name.
    either = [
        act if act is None or layout.group_size else replace(act, scales="group")
        for act, layout in zip(acts, layouts, strict=True)
    ]
    if acts[0] is not None and acts[0] == acts[1]:
        return str(acts[0])
    return str(either[0]) if either[0] is not None and either[0] == either[1] else None
