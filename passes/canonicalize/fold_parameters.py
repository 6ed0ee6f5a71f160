"""Arithmetic on weights alone moves into the weight store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.text import format_target
from qcompile.ir.types import Fact
from qcompile.ir.weights import TensorSpec
from qcompile.passes.canonicalize.normalize_linear import is_parameter
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult

aten = torch.ops.aten

MOVES = frozenset(
    {
        aten.transpose.int,
        aten.t.default,
        aten.permute.default,
        aten.view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.slice.Tensor,
        aten.select.int,
        aten.cat.default,
        aten.stack.default,
        aten.expand.default,
    }
)
"""Operators that only move elements, so that folding them rounds nothing."""


class FoldParameters(Pass):
    """``f(W1, W2, ...)`` with weights only  =>  one weight, derived lazily.

    Examples are transposed weights (GPT-2), ``1 + gain`` (Gemma), and concatenated projections.
    The result keeps the name of its first weight if nothing else uses that.
    """

    ensures = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Folds in graph order, so that chains fold step by step."""
        del context
        result = PassResult()
        editor = Editor(program)
        for node in program.calls():
            if not _is_foldable(node):
                continue
            name = _fold(program, node)
            with editor.before(node):
                editor.replace(node, editor.weight(name))
            result.rewrites += 1
        return result


def _is_foldable(node: fx.Node) -> bool:
    value = node.meta["val"]
    return (
        isinstance(value, Tensor)
        and all(isinstance(size, int) for size in value.shape)
        and bool(node.all_input_nodes)
        and all(operand.op == "get_attr" for operand in node.all_input_nodes)
        and is_parameter(node)
    )


def _fold(program: Program, node: fx.Node) -> str:
    """Defines the weight that a node computes, and returns its name."""
    operands = node.all_input_nodes
    names = tuple(str(operand.target) for operand in operands)
    value = node.meta["val"]
    name = names[0]
    if any(user is not node for n in program.parameters() if n.target == name for user in n.users):
        name = _fresh(program, f"{name}_{format_target(node.target).split('.')[-1]}")
    program.weights.derive(
        name,
        names,
        _as_function(node, operands),
        TensorSpec(tuple(value.shape), value.dtype),
        exact=node.target in MOVES,
        label=format_target(node.target).split(".")[-1],
    )
    return name


def _as_function(node: fx.Node, operands: list[fx.Node]) -> Callable[..., Tensor]:
    call: Any = node.target
    args, kwargs = node.args, node.kwargs
    position = {operand: i for i, operand in enumerate(operands)}

    # Nodes are replaced by their positions now: the graph will not outlive this pass.
    def freeze(operand: fx.Node) -> Any:
        return _Operand(position[operand])

    frozen = fx.node.map_arg((args, kwargs), freeze)

    def function(*tensors: Tensor) -> Tensor:
        wide = tensors[0].dtype if tensors[0].is_floating_point() else None

        def fill(value: Any) -> Any:
            if isinstance(value, _Operand):
                return tensors[value.position]
            return wide if value is torch.float32 and wide is not None else value

        filled_args, filled_kwargs = fx.node.map_aggregate(frozen, fill)
        result: Tensor = call(*filled_args, **filled_kwargs)
        return result

    return function


class _Operand:
    """Stands for an operand in the arguments of a folded call."""

    def __init__(self, position: int) -> None:
        self.position = position


def _fresh(program: Program, name: str) -> str:
    candidate, i = name, 2
    while candidate in program.weights:
        candidate, i = f"{name}{i}", i + 1
    return candidate
