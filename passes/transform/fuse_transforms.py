"""Transforms in the graph go into the weights beside them, or become one node each."""

from __future__ import annotations

import torch
from torch import fx

from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult, Skip
from qcompile.passes.transform.absorb import transform_weight
from qcompile.passes.transform.insert import (
    absorb_after,
    absorb_before,
    is_online,
    mark_online,
    read_transform,
    transform_node,
)
from qcompile.passes.transform.untie_weights import own_weight
from qcompile.passes.transform.values import Compose, Transform, simplify

aten = torch.ops.aten


class FuseTransforms(Pass):
    """Leaves as few transforms as it can.

    1. ``qc.transform(qc.transform(x, S), T)``      =>  ``qc.transform(x, S T)``, simplified
    2. a transform that is known to change nothing  =>  its input
    3. ``qc.transform(linear(x, W, c), T)``         =>  ``linear(x, T^T W, c T)``
    4. ``qc.transform(embedding(W, ids), T)``       =>  ``embedding(W T, ids)``
    5. ``linear(qc.transform(x, T), W, c)``         =>  ``linear(x, W T^T, c + W b)``

    Transforms that a method has put in to stay (`insert_before`) only merge, by 1 and 2. Every
    other one that is left is reported, with its reason and its cost. Weights change when they are
    materialized, in float64; one that others read as well is untied.
    """

    requires = frozenset({Fact.RAISED})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites until nothing changes."""
        del context
        result = PassResult()
        while any(_rewrite(program, node) for node in program.calls(dialect.transform)):
            result.rewrites += 1
        for node in program.calls(dialect.transform):
            cost = read_transform(program, node).cost()
            result.details.append(
                {
                    "transform": node.name,
                    "kind": str(node.args[2]),
                    "flops_per_row": cost.flops,
                    "parameter_bits": cost.parameter_bits,
                }
            )
            if not is_online(node):
                result.skips.append(Skip(node.name, "no weight beside it can absorb the transform"))
        return result


def _rewrite(program: Program, node: fx.Node) -> bool:
    return (
        _merge(program, node)
        or _drop(program, node)
        or (not is_online(node) and (_into_producer(program, node) or _into_readers(program, node)))
    )


def _merge(program: Program, node: fx.Node) -> bool:
    """Rule 1: a transform with a transform in front that nothing else reads."""
    inner = node.args[0]
    if not isinstance(inner, fx.Node) or inner.target is not dialect.transform:
        return False
    if len(inner.users) > 1:
        return False
    both = simplify(Compose((read_transform(program, inner), read_transform(program, node))))
    x = inner.args[0]
    assert isinstance(x, fx.Node)
    editor = Editor(program)
    with editor.before(node):
        merged = transform_node(editor, x, both, _stem(node))
    if is_online(node) or is_online(inner):
        mark_online(merged)
    editor.replace(node, merged)
    program.graph.erase_node(inner)
    return True


def _drop(program: Program, node: fx.Node) -> bool:
    """Rule 2."""
    if not simplify(read_transform(program, node)).is_identity:
        return False
    x = node.args[0]
    assert isinstance(x, fx.Node)
    Editor(program).replace(node, x)
    return True


def _into_producer(program: Program, node: fx.Node) -> bool:
    """Rules 3 and 4: a layer that nothing but the transform reads."""
    layer = node.args[0]
    if not isinstance(layer, fx.Node) or set(layer.users) != {node}:
        return False
    is_linear = layer.target is aten.linear.default
    if not is_linear and layer.target is not aten.embedding.default:
        return False
    weight = layer.args[1 if is_linear else 0]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return False
    value = read_transform(program, node)
    if is_linear:
        absorb_after(program, layer, value)
    else:
        name, _ = own_weight(program, str(weight.target), layer)
        transform_weight(program, name, 1, value)
    Editor(program).replace(node, layer)
    return True


def _into_readers(program: Program, node: fx.Node) -> bool:
    """Rule 5, if all that reads the transform is linears over stored weights."""
    if not node.users or not all(_is_layer_over(user, node) for user in node.users):
        return False
    value: Transform = read_transform(program, node)
    for linear in list(node.users):
        absorb_before(program, linear, value)
    x = node.args[0]
    assert isinstance(x, fx.Node)
    Editor(program).replace(node, x)
    return True


def _is_layer_over(user: fx.Node, value: fx.Node) -> bool:
    if user.target is not aten.linear.default or user.args[0] is not value:
        return False
    weight = user.args[1]
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and value not in user.args[1:]


def _stem(node: fx.Node) -> str:
    """What a node's parameters are called after."""
    params = node.args[1]
    assert isinstance(params, (list, tuple))
    names = [str(p.target) for p in params if isinstance(p, fx.Node)]
    return names[0].rpartition(".transform")[0] if names else node.name
