"""Layers that read one value become one node, with the norm before and the gate behind them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from qcompile.backends.cpu import fused_ops, ops
from qcompile.backends.cpu.translations import GATED_ACTIVATIONS
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult


class FuseSiblings(Pass):
    """Rounds an input once, and wakes the threads once, for all layers that read it.

    1. ``gated_act(cpu_linear(x, G), cpu_linear(x, U), kind)`` => ``cpu_gated_linear(x, G, U)``
    2. ``cpu_linear(x, A), cpu_linear(x, B)[, cpu_linear(x, C)]`` => ``cpu_linears(x, [A, B, C])``
    3. either of them after ``rms_norm``, which nothing else reads => the same, ``normed``

    The layers must have one layout but for their number of outputs, the same rounding of their
    input, and no residual to add.
    """

    requires = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites every group of layers."""
        del context
        result = PassResult()
        editor = Editor(program)
        for node in program.calls(dialect.gated_act):
            result.rewrites += _fuse_gated(editor, node)
        for source in list(program.graph.nodes):
            for layers in _siblings(source):
                _fuse_layers(editor, layers)
                result.rewrites += 1
        return result


@dataclass(frozen=True)
class _Layer:
    """A call of `ops.linear` that adds no residual."""

    node: fx.Node

    @staticmethod
    def of(node: Any) -> _Layer | None:
        if not isinstance(node, fx.Node) or node.target is not ops.linear:
            return None
        return _Layer(node) if node.args[3] is None else None

    @property
    def source(self) -> fx.Node:
        source = self.node.args[0]
        assert isinstance(source, fx.Node)
        return source

    @property
    def bias(self) -> Any:
        return self.node.args[2]

    @property
    def outputs(self) -> Any:
        return self.node.args[4]

    @property
    def layout(self) -> tuple[Any, ...]:
        """k, layout of the weight, act."""
        return tuple(self.node.args[5:8])

    @property
    def grid(self) -> str | None:
        """The weight that says how static codes of the input are made."""
        (grid,) = self.node.args[8:] or (None,)
        return str(grid.target) if isinstance(grid, fx.Node) else None

    def grid_again(self, editor: Editor) -> tuple[fx.Node, ...]:
        """The last argument of calls, where the editor stands; none where there is no grid."""
        return () if self.grid is None else (editor.weight(self.grid),)

    def goes_with(self, other: _Layer) -> bool:
        """Whether one node can compute both."""
        alike = (self.bias is None) == (other.bias is None) and self.grid == other.grid
        return alike and self.source is other.source and self.layout == other.layout

    def weight(self, editor: Editor) -> fx.Node:
        return _again(editor, self.node.args[1])


def _fuse_gated(editor: Editor, node: fx.Node) -> bool:
    gate, up = _Layer.of(node.args[0]), _Layer.of(node.args[1])
    if gate is None or up is None or node.args[2] not in GATED_ACTIVATIONS:
        return False
    alone = len(gate.node.users) == len(up.node.users) == 1 and gate.node is not up.node
    if not alone or not gate.goes_with(up) or gate.outputs != up.outputs:
        return False
    with editor.before(node):
        x, norm_weight, norm = _norm(editor, (gate, up))
        operands = (gate.weight(editor), gate.bias, up.weight(editor), up.bias)
        layout = (gate.outputs, *gate.layout)
        new = editor.call(
            fused_ops.gated_linear,
            *(x, norm_weight, *operands, *layout, node.args[2], *norm),
            *gate.grid_again(editor),
        )
    editor.replace(node, new)
    return True


def _siblings(source: fx.Node) -> list[list[_Layer]]:
    """The layers that read a value, in groups that one node can compute."""
    groups: list[list[_Layer]] = []
    for layer in filter(None, map(_Layer.of, source.users)):
        if layer.source is not source:
            continue
        for group in groups:
            if len(group) < fused_ops.MOST_LAYERS and group[0].goes_with(layer):
                group.append(layer)
                break
        else:
            groups.append([layer])
    return [group for group in groups if len(group) > 1]


def _fuse_layers(editor: Editor, layers: Sequence[_Layer]) -> None:
    order = {node: place for place, node in enumerate(editor.graph.nodes)}
    first = min(layers, key=lambda layer: order[layer.node])
    with editor.before(first.node):
        x, norm_weight, norm = _norm(editor, layers)
        packed = [layer.weight(editor) for layer in layers]
        biases = [_again(editor, layer.bias) for layer in layers if layer.bias is not None]
        sizes = [layer.outputs for layer in layers]
        fused = editor.call(
            fused_ops.linears,
            *(x, norm_weight, packed, biases, sizes, *first.layout, *norm),
            *first.grid_again(editor),
        )
        results = [editor.call(operator.getitem, fused, i) for i in range(len(layers))]
    for layer, result in zip(layers, results, strict=True):
        editor.replace(layer.node, result)


def _norm(
    editor: Editor, layers: Sequence[_Layer]
) -> tuple[fx.Node, fx.Node | None, tuple[bool, float]]:
    """What is normed, by which gain, and the arguments that say how; the input if nothing is."""
    x = layers[0].source
    nodes = {layer.node for layer in layers}
    if x.target is not dialect.rms_norm or set(x.users) != nodes:
        return x, None, (False, 0.0)
    source, weight, epsilon = x.args
    assert isinstance(source, fx.Node)
    assert isinstance(epsilon, float)
    return source, None if weight is None else _again(editor, weight), (True, epsilon)


def _again(editor: Editor, node: Any) -> fx.Node:
    """A value where the editor stands; weights are referred to anew, as they may stand behind."""
    assert isinstance(node, fx.Node)
    return editor.weight(str(node.target)) if node.op == "get_attr" else node
