"""What running a program takes: operations, memory of values and of the cache, by its sizes.

The figures are those of the program as it is written: one multiplication or one addition is one
operation, a value takes memory from the node that makes it to the last node that reads it, views
take none. A target that fuses nodes needs less; none needs fewer multiplications.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from qcompile.ir import dialect
from qcompile.ir.caches import cache_format
from qcompile.ir.program import Program
from qcompile.ir.types import PAST_ROLES, Role
from qcompile.kernels.transform.flops import transform_flops

aten = torch.ops.aten


@dataclass(frozen=True)
class Sizes:
    """How much a program is run on.

    Attributes:
        batch: Sequences side by side.
        query: New positions in each.
        past: Positions that the cache holds already.
    """

    batch: int = 1
    query: int = 512
    past: int = 0


@dataclass(frozen=True)
class Cost:
    """What a part of a program takes.

    Attributes:
        flops: Multiplications and additions of numbers; moving them counts nothing.
        activation_bytes: The most that the values alive at one time take, without weights and
            cache; those that only wait for a later part count, too.
        cache_bytes: Keys and values that are kept, the new positions included.
    """

    flops: int
    activation_bytes: int
    cache_bytes: int


class CostModel:
    """The costs of a program at given sizes.

    Args:
        program: Any program in terms of ATen and the dialect.
        sizes: What it is run on. Sizes that are neither batch, query nor past (those of a plain
            module's inputs) stay as they were traced; sizes that depend on data count as 1.
    """

    def __init__(self, program: Program, sizes: Sizes) -> None:
        self._known = _bind_sizes(program, sizes)
        self._evaluated: dict[Any, int] = {}
        self._alive = self._live_bytes(program)

    def total(self, program: Program) -> Cost:
        """The cost of a whole program."""
        return self.part(program.graph.nodes)

    def part(self, nodes: Iterable[fx.Node]) -> Cost:
        """The cost of some of the program's nodes."""
        flops = activations = cache = 0
        for node in nodes:
            flops += self.flops(node)
            activations = max(activations, self._alive.get(node, 0))
            if node.target is dialect.kv_append:
                cache += self._cache_bytes(node)
        return Cost(flops, activations, cache)

    def flops(self, node: fx.Node) -> int:
        """Operations of one node; 0 for what moves numbers or reckons with sizes."""
        value = node.meta.get("val")
        results = value if isinstance(value, (list, tuple)) else (value,)
        tensors = [item for item in results if isinstance(item, Tensor)]
        if node.op != "call_function" or not tensors or node.target in _MOVES or _is_view(node):
            return 0
        formula = _FORMULAS.get(node.target)
        if formula is not None:
            return formula(self, node)
        each = _PER_ELEMENT.get(node.target, 1)
        return each * sum(self.elements(item) for item in tensors)

    def elements(self, value: Tensor) -> int:
        """Elements of a fake tensor."""
        return math.prod(self.size(size) for size in value.shape)

    def size(self, size: int | torch.SymInt) -> int:
        """A dimension as a number."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self._evaluated:
            self._evaluated[expression] = self._evaluate(size, expression)
        return self._evaluated[expression]

    def _evaluate(self, size: torch.SymInt, expression: Any) -> int:
        value = sympy.sympify(expression).subs(self._known)
        if value.is_number:
            return max(0, int(value))
        return int(size.node.hint) if size.node.has_hint() else 1

    def _bytes(self, value: Any) -> int:
        if isinstance(value, (list, tuple)):
            return sum(map(self._bytes, value))
        return self.elements(value) * value.dtype.itemsize if isinstance(value, Tensor) else 0

    def _cache_bytes(self, append: fx.Node) -> int:
        """Bytes of a grown cache, in its format."""
        value = append.meta["val"]
        format = cache_format(append)
        if not format.rounds:
            return self._bytes(value)
        width = self.size(value.shape[-1])
        return self.elements(value) // width * format.row_bytes(width)

    def _live_bytes(self, program: Program) -> dict[fx.Node, int]:
        """For each node, the bytes of all values alive while it runs."""
        order = {node: position for position, node in enumerate(program.graph.nodes)}
        owner: dict[fx.Node, fx.Node] = {}
        last_use: dict[fx.Node, int] = {}
        for node in order:
            owner[node] = _storage(node, owner)
            last_use[owner[node]] = order[node]
            for operand in node.all_input_nodes:
                last_use[owner[operand]] = order[node]
        kept = _kept_elsewhere(program)
        changes = [0] * (len(order) + 1)
        for node, position in order.items():
            if owner[node] is node and node not in kept:
                size = self._bytes(node.meta.get("val"))
                changes[position] += size
                changes[last_use[node] + 1] -= size
        alive, found = 0, {}
        for node, position in order.items():
            alive += changes[position]
            found[node] = alive
        return found


def size_names(program: Program) -> dict[sympy.Symbol, str]:
    """What the sizes of a program's inputs mean: ``batch``, ``query``, ``past`` or ``total``.

    Sizes that a role does not explain are left out.
    """
    names: dict[sympy.Symbol, str] = {}
    for node, port in zip(program.inputs, program.signature.inputs, strict=True):
        shape = getattr(node.meta["val"], "shape", ())
        for size, name in zip(shape, _AXES.get(port.role, ("batch", "query")), strict=False):
            if name and isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                names.setdefault(size.node.expr, name)
    return names


_CACHE_AXES = ("batch", "", "past")
_AXES: Mapping[Role, tuple[str, ...]] = MappingProxyType(
    {
        Role.PAST_KEY: _CACHE_AXES,
        Role.PAST_VALUE: _CACHE_AXES,
        Role.PAST_STATE: ("batch",),
        Role.ATTENTION_MASK: ("batch", "total"),
        Role.TENSOR: ("batch",),
    }
)
"""What the axes of an input are, by its role; those of all others are batch and query."""


def _bind_sizes(program: Program, sizes: Sizes) -> Mapping[sympy.Symbol, int]:
    """The symbols of a program's inputs as numbers."""
    numbers = {
        "batch": sizes.batch,
        "query": sizes.query,
        "past": sizes.past,
        "total": sizes.past + sizes.query,
    }
    return {symbol: numbers[name] for symbol, name in size_names(program).items()}


def _kept_elsewhere(program: Program) -> set[fx.Node]:
    """Weights, stored or decoded, and the cache: they are counted by themselves."""
    kept = {
        node
        for node, port in zip(program.inputs, program.signature.inputs, strict=True)
        if port.role in PAST_ROLES
    }
    stored: set[fx.Node] = set()  # and what follows from nothing else, such as decoded codes
    for node in program.graph.nodes:
        decodes = bool(node.all_input_nodes) and stored.issuperset(node.all_input_nodes)
        if node.op == "get_attr" or (node.op == "call_function" and decodes):
            stored.add(node)
        if node in stored or node.op == "output" or node.target is dialect.kv_append:
            kept.add(node)
    return kept


def _storage(node: fx.Node, owner: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The node whose memory a value stands in."""
    if _is_view(node) and node.all_input_nodes:
        return owner[node.all_input_nodes[0]]
    return node


def _is_view(node: fx.Node) -> bool:
    """Whether a call only looks at its first operand in another way."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(result.alias_info is not None for result in node.target._schema.returns)


# --- Operations by operator ------------------------------------------------------------------

Formula = Callable[[CostModel, fx.Node], int]


def _product_flops(inner: Callable[[Sequence[Any]], Any]) -> Formula:
    """A matrix product: two operations per element of the result and of the inner axis."""

    def formula(model: CostModel, node: fx.Node) -> int:
        operand = inner(node.args)
        return 2 * model.elements(node.meta["val"]) * model.size(operand.meta["val"].shape[-1])

    return formula


def _convolution_flops(model: CostModel, node: fx.Node) -> int:
    x, weight = _operand(node, 0), _operand(node, 1)
    transposed = node.target is aten.convolution.default and bool(node.args[6])
    positions = x if transposed else node.meta["val"]
    return 2 * model.elements(positions) * model.elements(weight) // model.size(weight.shape[0])


def _recurrence_flops(model: CostModel, node: fx.Node) -> int:
    """A matrix of each position and head is decayed, added to and read; with a rate, read twice."""
    key, value = _operand(node, 1), _operand(node, 2)
    each = 5 if node.args[4] is None else 7
    return each * model.elements(value) * model.size(key.shape[-1])


def _attention_flops(model: CostModel, node: fx.Node) -> int:
    """Scores and weighted values of the pairs that causality and window let through."""
    query, key, value = (_operand(node, i) for i in range(3))
    batch, heads, rows, width = (model.size(size) for size in query.shape)
    columns, out = model.size(key.shape[2]), model.size(value.shape[3])
    args: tuple[Any, ...] = node.args
    if node.target is dialect.attention:
        causal, window = bool(args[7]), int(args[8])
    else:
        causal, window = len(args) > 5 and bool(args[5]), 0
    pairs = _visible_pairs(rows, columns, causal, window)
    return 2 * batch * heads * pairs * (width + out)


def _visible_pairs(rows: int, columns: int, causal: bool, window: int) -> int:
    """Pairs of a query and a key that it sees; the queries are the last of the positions."""
    if not causal and not window:
        return rows * columns
    limit = min(window or columns, columns)
    first = columns - rows + 1 if causal else columns
    seen = (min(max(first + i, 0) if causal else columns, limit) for i in range(rows))
    return sum(seen)


def _experts_flops(*weights: int) -> Formula:
    """Matrix products for each token and each of its experts.

    Args:
        weights: Where the stacked matrices stand among the arguments.
    """

    def flops(model: CostModel, node: fx.Node) -> int:
        matrices = [_operand(node, place) for place in weights]
        each = sum(model.elements(w) // model.size(w.shape[0]) for w in matrices)
        return 2 * model.elements(_operand(node, 1)) * each

    return flops


def _transform_flops(model: CostModel, node: fx.Node) -> int:
    """Those of each vector along the last axis."""
    arguments: tuple[Any, ...] = node.args
    _, params, kind, dims = arguments
    value: Tensor = node.meta["val"]
    n = model.size(value.shape[-1])
    shapes = [param.meta["val"].shape for param in params]
    return model.elements(value) // max(1, n) * transform_flops(n, shapes, kind, dims)


def _scale_flops(model: CostModel, node: fx.Node) -> int:
    """A magnitude and a comparison for each value that is measured."""
    return 2 * model.elements(_operand(node, 0))


def _operand(node: fx.Node, position: int) -> Any:
    """The fake tensor that stands at a position of the arguments."""
    operand = node.args[position]
    assert isinstance(operand, fx.Node)
    return operand.meta["val"]


_FORMULAS: Mapping[Any, Formula] = MappingProxyType(
    {
        aten.linear.default: _product_flops(lambda args: args[0]),
        aten.mm.default: _product_flops(lambda args: args[0]),
        aten.bmm.default: _product_flops(lambda args: args[0]),
        aten.matmul.default: _product_flops(lambda args: args[0]),
        aten.addmm.default: _product_flops(lambda args: args[1]),
        aten.baddbmm.default: _product_flops(lambda args: args[1]),
        aten.convolution.default: _convolution_flops,
        aten.conv1d.default: _convolution_flops,
        aten.conv2d.default: _convolution_flops,
        aten.conv3d.default: _convolution_flops,
        dialect.causal_conv: _convolution_flops,
        dialect.linear_recurrence: _recurrence_flops,
        aten.scaled_dot_product_attention.default: _attention_flops,
        dialect.attention: _attention_flops,
        dialect.dynamic_scale: _scale_flops,
        dialect.float_scale: _scale_flops,
        dialect.transform: _transform_flops,
        dialect.experts: _experts_flops(3, 5),
        dialect.expert_hidden: _experts_flops(2),
        dialect.expert_output: _experts_flops(3),
    }
)

_PER_ELEMENT: Mapping[Any, int] = MappingProxyType(
    {
        dialect.rms_norm: 4,  # square, sum, scale, gain
        dialect.layer_norm: 7,  # mean, difference, square, sum, scale, gain, bias
        dialect.rope: 3,  # two products and their sum
        dialect.act: 4,
        dialect.gated_act: 5,
        dialect.quantize: 2,
        dialect.quantize_float: 2,
        dialect.dequantize: 2,
        aten.softmax.int: 5,
        aten.silu.default: 4,
        aten.gelu.default: 4,
        aten.layer_norm.default: 7,
    }
)
"""Operations per element of the result, where that is not one."""

_MOVES = frozenset(
    {
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.cat.default,
        aten.clone.default,
        aten.constant_pad_nd.default,
        aten.embedding.default,
        aten.full.default,
        aten.full_like.default,
        aten.gather.default,
        aten.index.Tensor,
        aten.index_select.default,
        aten.masked_fill.Scalar,
        aten.ones.default,
        aten.pad.default,
        aten.repeat.default,
        aten.roll.default,
        aten.scalar_tensor.default,
        aten.scatter.src,
        aten.stack.default,
        aten.where.self,
        aten.zeros.default,
        dialect.kv_append,
    }
)
"""Operators that make, copy or choose numbers."""
