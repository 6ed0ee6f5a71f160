"""Every product of an activation with a weight matrix becomes an `aten.linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.edit import Editor
from qcompile.passes.infra import Exact
from qcompile.passes.rule import ANY, ApplyRules, Const, Match, OneOf, Rule

aten = torch.ops.aten


class NormalizeLinear(ApplyRules):
    """Spells dense layers and products one way; each rewrite is one of the rules below.

    Matrices must be weights, or computed from weights alone; `FoldParameters` then absorbs the
    transposes.
    """

    numerics = Exact()

    def __init__(self) -> None:
        super().__init__(
            (
                AddmmToLinear(),
                ProductToLinear(),
                LinearWithoutFlattening(),
                BiasIntoLinear(),
                BmmToMatmul(),
                BaddbmmToMatmul(),
            ),
            report_misses=False,
        )


class AddmmToLinear(Rule):
    """``addmm(b, x, W)``  =>  ``linear(x, transpose(W), b)``."""

    def pattern(self, bias: Tensor, x: Tensor, weight: Tensor) -> Any:
        """The product, with factors of 1."""
        return aten.addmm.default(bias, x, weight)

    def check(self, match: Match) -> str | None:
        """The bias must be a vector of weights."""
        if not is_parameter(match["bias"]) or match.value("bias").dim() != 1:
            return "the bias is no vector of weights"
        return _check_matrix(match)

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """The layer."""
        transposed = edit.call(aten.transpose.int, match["weight"], 0, 1)
        return edit.call(aten.linear.default, match["x"], transposed, match["bias"])


class ProductToLinear(Rule):
    """``mm(x, W)``, ``matmul(x, W)``  =>  ``linear(x, transpose(W))``."""

    def pattern(self, x: Tensor, weight: Tensor) -> Any:
        """Either product."""
        return OneOf(aten.mm.default(x, weight), aten.matmul.default(x, weight))

    def check(self, match: Match) -> str | None:
        """One operand must be a matrix of weights, the other not."""
        return _check_matrix(match)

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """The layer."""
        transposed = edit.call(aten.transpose.int, match["weight"], 0, 1)
        return edit.call(aten.linear.default, match["x"], transposed)


class LinearWithoutFlattening(Rule):
    """``view(linear(view(x, [-1, K]), W, b), [..., N])``  =>  ``linear(x, W, b)``."""

    def pattern(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        """A layer between two views."""
        flat = OneOf(aten.view.default(x, ANY()), aten.reshape.default(x, ANY()))
        product = aten.linear.default(flat, weight, bias)
        return OneOf(
            aten.view.default(product, ANY()),
            aten.reshape.default(product, ANY()),
            aten._unsafe_view.default(product, ANY()),
        )

    def check(self, match: Match) -> str | None:
        """The views must only join the leading axes and split them again."""
        before, after = match.value("x").shape, match.outputs[0].meta["val"].shape
        columns, rows = match.value("weight").shape[1], match.value("weight").shape[0]
        joined = str(before[:-1]) == str(after[:-1])
        if not joined or str(before[-1]) != str(columns) or str(after[-1]) != str(rows):
            return "the views change more than the leading axes"
        return None

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """The layer alone."""
        bias = match["bias"]
        operands = (match["x"], match["weight"], *(() if bias is None else (bias,)))
        return edit.call(aten.linear.default, *operands)


class BiasIntoLinear(Rule):
    """``add(linear(x, W), b)`` with a vector `b` of weights  =>  ``linear(x, W, b)``."""

    def pattern(self, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        """A layer without bias, and a sum."""
        return aten.add.Tensor(aten.linear.default(x, weight), bias)

    def check(self, match: Match) -> str | None:
        """The other summand must have one number per output."""
        if not is_parameter(match["bias"]):
            return "what is added depends on the input"
        if str(match.value("bias").shape) != str(match.value("weight").shape[:1]):
            return "what is added is no vector over the outputs"
        return None

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """The layer with its bias."""
        return edit.call(aten.linear.default, match["x"], match["weight"], match["bias"])


class BmmToMatmul(Rule):
    """``bmm(x, y)``  =>  ``matmul(x, y)``."""

    def pattern(self, x: Tensor, y: Tensor) -> Any:
        """The product."""
        return aten.bmm.default(x, y)

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """The same, spelled as other products are."""
        return edit.call(aten.matmul.default, match["x"], match["y"])


class BaddbmmToMatmul(Rule):
    """``baddbmm(b, x, y, beta, alpha)``  =>  ``beta * b + alpha * matmul(x, y)``."""

    def pattern(self, added: Tensor, x: Tensor, y: Tensor, beta: Const, alpha: Const) -> Any:
        """The product with its factors."""
        return aten.baddbmm.default(added, x, y, beta=beta, alpha=alpha)

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """The sum; a factor of zero silences even what is not finite."""
        product = edit.call(aten.matmul.default, match["x"], match["y"])
        if match["alpha"] != 1:
            product = edit.call(aten.mul.Tensor, product, match["alpha"])
        if match["beta"] == 0:
            return product
        added = match["added"]
        if match["beta"] != 1:
            added = edit.call(aten.mul.Tensor, added, match["beta"])
        return edit.call(aten.add.Tensor, added, product)


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


def _check_matrix(match: Match) -> str | None:
    if not is_parameter(match["weight"]) or match.value("weight").dim() != 2:
        return "the second factor is no matrix of weights"
    return "both factors are weights" if is_parameter(match["x"]) else None
