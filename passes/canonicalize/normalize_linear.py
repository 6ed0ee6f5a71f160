"""Every product of an activation with a weight matrix becomes an `aten.linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, Exact, Pass, PassResult

aten = torch.ops.aten


class NormalizeLinear(Pass):
    """Spells dense layers and products one way.

    1. ``addmm(b, x, W)``                           =>  ``linear(x, transpose(W), b)``
    2. ``mm(x, W)``, ``matmul(x, W)``               =>  ``linear(x, transpose(W))``
    3. ``view(linear(view(x, [-1, K]), ...), ...)`` =>  ``linear(x, ...)``
    4. ``add(linear(x, W), b)`` with a vector `b`   =>  ``linear(x, W, b)``
    5. ``bmm(x, y)``                                =>  ``matmul(x, y)``
    6. ``baddbmm(b, x, y, beta, alpha)``            =>  ``beta * b + alpha * matmul(x, y)``

    `W` must be a weight, or a transpose of one; `FoldParameters` then absorbs the transposes.
    """

    numerics = Exact()

    def run(self, program: Program, context: Context) -> PassResult:
        """Applies the rewrites in one sweep."""
        del context
        result = PassResult()
        editor = Editor(program)
        for node in program.calls():
            replacement = (
                _from_product(editor, node)
                or _without_flattening(editor, node)
                or _with_bias(editor, node)
                or _batched(editor, node)
            )
            if replacement is not None:
                editor.replace(node, replacement)
                result.rewrites += 1
        return result


def is_parameter(value: Any) -> bool:
    """Whether a value depends on weights only."""
    if not isinstance(value, fx.Node):
        return not isinstance(value, (list, tuple)) or all(map(is_parameter, value))
    if value.op == "get_attr":
        return True
    return (
        value.op == "call_function"
        and any(isinstance(argument, fx.Node) for argument in value.all_input_nodes)
        and all(map(is_parameter, value.args))
        and all(map(is_parameter, value.kwargs.values()))
    )


def _from_product(editor: Editor, node: fx.Node) -> fx.Node | None:
    bias: Any = None
    if node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
        if not is_parameter(bias) or _rank(bias) != 1:
            return None
    elif node.target in (aten.mm.default, aten.matmul.default):
        x, weight = node.args
    else:
        return None
    if not isinstance(weight, fx.Node) or not is_parameter(weight) or _rank(weight) != 2:
        return None
    if is_parameter(x):
        return None
    with editor.before(node):
        transposed = editor.call(aten.transpose.int, weight, 0, 1)
        arguments = (x, transposed) if bias is None else (x, transposed, bias)
        return editor.call(aten.linear.default, *arguments)


def _without_flattening(editor: Editor, node: fx.Node) -> fx.Node | None:
    """``view(linear(view(x)))`` where the views only join and split the leading axes."""
    if node.target not in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return None
    linear = node.args[0]
    if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default:
        return None
    flat = linear.args[0]
    if len(linear.users) > 1 or not isinstance(flat, fx.Node):
        return None
    if flat.target not in (aten.view.default, aten.reshape.default):
        return None
    x = flat.args[0]
    assert isinstance(x, fx.Node)
    before, after = x.meta["val"].shape, node.meta["val"].shape
    if len(flat.meta["val"].shape) != 2 or str(before[:-1]) != str(after[:-1]):
        return None
    if str(before[-1]) != str(flat.meta["val"].shape[-1]):
        return None
    if str(after[-1]) != str(linear.meta["val"].shape[-1]):
        return None
    with editor.before(node):
        return editor.call(aten.linear.default, x, *linear.args[1:], **linear.kwargs)


def _with_bias(editor: Editor, node: fx.Node) -> fx.Node | None:
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    for linear, bias in (node.args, node.args[::-1]):
        if (
            isinstance(linear, fx.Node)
            and linear.target is aten.linear.default
            and len(linear.args) == 2
            and len(linear.users) == 1
            and isinstance(bias, fx.Node)
            and is_parameter(bias)
            and str(bias.meta["val"].shape) == str(linear.meta["val"].shape[-1:])
        ):
            with editor.before(node):
                return editor.call(aten.linear.default, *linear.args, bias)
    return None


def _batched(editor: Editor, node: fx.Node) -> fx.Node | None:
    if node.target is aten.bmm.default:
        with editor.before(node):
            return editor.call(aten.matmul.default, *node.args)
    if node.target is not aten.baddbmm.default:
        return None
    operands: tuple[Any, ...] = node.args
    added, x, y = operands
    with editor.before(node):
        product = editor.call(aten.matmul.default, x, y)
        terms: list[fx.Node] = []
        for term, key in ((added, "beta"), (product, "alpha")):
            factor = node.kwargs.get(key, 1)
            terms.append(term if factor == 1 else editor.call(aten.mul.Tensor, term, factor))
        # A factor of zero silences even what is not finite.
        return terms[1] if node.kwargs.get("beta", 1) == 0 else editor.call(aten.add.Tensor, *terms)


def _rank(value: Any) -> int:
    return len(value.meta["val"].shape) if isinstance(value, fx.Node) else 0
