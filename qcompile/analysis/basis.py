"""What every operator does to the bases of its operands, per family of transforms.

One function per operator, in `RULES`. It looks up the feature axes of its operands, makes or
passes on those of its result, and declares links, ports and blockers. An operator without a rule
blocks every feature axis that it touches, so what is unknown is never transformed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.analysis.axes import ALL_FAMILIES, Axes
from qcompile.analysis.families import Family, PortRole
from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.ir.text import format_target
from qcompile.ir.types import Role

aten = torch.ops.aten

P, D, R = Family.PERMUTATION, Family.DIAGONAL, Family.ORTHOGONAL

Dims = tuple[int, ...]
"""Dimensions of a value that together make one feature axis, outermost first."""


@dataclass(frozen=True)
class Norm:
    """A normalization whose gain must be folded before its basis can be rotated.

    Attributes:
        node: The call.
        axis: The feature axis of its input.
        centred: Whether it subtracts the mean, so that its producers must be centred first.
    """

    node: fx.Node
    axis: int
    centred: bool


@dataclass
class BasisMap:
    """The feature axes of every value in a program.

    Attributes:
        axes: Axes, links, ports and blockers.
        features: For each value its feature axes by their dimensions.
        norms: The normalizations met.
    """

    axes: Axes = field(default_factory=Axes)
    features: dict[fx.Node, dict[Dims, int]] = field(default_factory=dict)
    norms: list[Norm] = field(default_factory=list)

    def of(self, node: fx.Node, dims: Dims) -> int:
        """The feature axis on some dimensions; unknown where it comes from, it may not change."""
        known = self.features.setdefault(node, {})
        if dims not in known:
            known[dims] = self.axes.new(_size(node, dims))
            self.axes.block(known[dims], node.name, _origin(node))
        return known[dims]

    def give(self, node: fx.Node, dims: Dims, axis: int) -> None:
        """Says that a value has a feature axis on some dimensions."""
        self.features.setdefault(node, {})[dims] = axis

    def fresh(self, node: fx.Node, dims: Dims) -> int:
        """A new feature axis on some dimensions of a value."""
        axis = self.axes.new(_size(node, dims))
        self.give(node, dims, axis)
        return axis

    def port(
        self,
        axis: int,
        weight: fx.Node,
        weight_axis: int,
        role: PortRole,
        families: Iterable[Family] = ALL_FAMILIES,
        *,
        weight_start: int = 0,
    ) -> None:
        """Puts a weight's axis, or a stretch of it, on a feature axis."""
        size = _size(weight, (weight_axis,))
        name = str(weight.target)
        self.axes.port(axis, name, weight_axis, size, role, families, weight_start=weight_start)

    def block_all(self, node: fx.Node, reason: str) -> None:
        """Blocks every feature axis of a value."""
        for axis in self.features.get(node, {}).values():
            self.axes.block(axis, node.name, reason)


def map_bases(program: Program) -> BasisMap:
    """Walks a raised program once and declares every operator."""
    bases = BasisMap()
    for node in program.graph.nodes:
        if node.op == "call_function" and not _is_size(node):
            _visit(bases, node)
    for port, result in zip(program.signature.outputs, program.results, strict=True):
        if port.role not in (Role.PRESENT_KEY, Role.PRESENT_VALUE):
            bases.block_all(result, f"it is the output '{port.name}'")
    return bases


def _visit(bases: BasisMap, node: fx.Node) -> None:
    rule = RULES.get(node.target)
    handled: Iterable[fx.Node] = rule(bases, node) if rule is not None else ()
    done = set(handled)
    for operand in node.all_input_nodes:
        if operand not in done and operand.op != "get_attr":
            bases.block_all(operand, f"{format_target(node.target)} needs it as it is")


Rule = Callable[[BasisMap, fx.Node], Iterable[fx.Node]]
"""Declares one call and returns the operands whose axes it has dealt with."""


# Layers.


def _linear(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, weight = _operand(node, 0), _operand(node, 1)
    bias = node.args[2] if len(node.args) > 2 else None
    axis, out = bases.of(x, (_rank(x) - 1,)), bases.fresh(node, (_rank(node) - 1,))
    if weight.op != "get_attr":
        bases.axes.block(axis, node.name, "the weight of the linear is computed or quantized")
        bases.axes.block(out, node.name, "the weight of the linear is computed or quantized")
        return [x]
    bases.port(axis, weight, 1, PortRole.SINK)
    bases.port(out, weight, 0, PortRole.SOURCE)
    _add_bias(bases, node, out, bias)
    return [x]


def _convolution(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, weight = _operand(node, 0), _operand(node, 1)
    bias = node.args[2] if len(node.args) > 2 else None
    groups = node.args[6] if len(node.args) > 6 else 1
    axis, out = bases.of(x, (1,)), bases.fresh(node, (1,))
    if weight.op != "get_attr" or groups != 1:
        reason = "a grouped convolution" if groups != 1 else "the weight is computed"
        bases.axes.block(axis, node.name, reason)
        bases.axes.block(out, node.name, reason)
        return [x]
    bases.port(axis, weight, 1, PortRole.SINK)
    bases.port(out, weight, 0, PortRole.SOURCE)
    _add_bias(bases, node, out, bias)
    return [x]


def _add_bias(bases: BasisMap, node: fx.Node, out: int, bias: Any) -> None:
    if isinstance(bias, fx.Node) and bias.op == "get_attr":
        bases.port(out, bias, 0, PortRole.SOURCE)
    elif bias is not None:
        bases.axes.block(out, node.name, "its bias is computed")


def _embedding(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    weight = _operand(node, 0)
    out = bases.fresh(node, (_rank(node) - 1,))
    if weight.op == "get_attr":
        bases.port(out, weight, 1, PortRole.SOURCE)
    else:
        bases.axes.block(out, node.name, "the table is computed or quantized")
    return []


def _experts(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, _, _, up, up_bias, down, down_bias, kind, gated, limit, _ = node.args
    assert isinstance(x, fx.Node)
    axis, out = bases.of(x, (_rank(x) - 1,)), bases.fresh(node, (_rank(node) - 1,))
    weights = [w for w in (up, up_bias, down, down_bias) if w is not None]
    if not all(isinstance(w, fx.Node) and w.op == "get_attr" for w in weights):
        bases.axes.block(axis, node.name, "the experts' weights are computed")
        return [x]
    assert isinstance(up, fx.Node) and isinstance(down, fx.Node)
    bases.port(axis, up, 2, PortRole.SINK)
    bases.port(out, down, 1, PortRole.SOURCE)
    if isinstance(down_bias, fx.Node):
        bases.port(out, down_bias, 1, PortRole.SOURCE)
    width = _size(down, (2,))
    hidden = bases.axes.new(width)
    bases.port(hidden, down, 2, PortRole.SINK)
    halves = {0: {P}, width: {P, D}} if gated else {0: {P, D} if kind == "relu" else {P}}
    for start, families in halves.items():
        for rows in (up, up_bias):
            if isinstance(rows, fx.Node):
                bases.port(hidden, rows, 1, PortRole.SOURCE, families, weight_start=start)
    bases.axes.block(hidden, node.name, "inside the experts an activation is applied", {R})
    if limit or up_bias is not None:
        bases.axes.block(hidden, node.name, "inside the experts values are clamped or shifted", {D})
    return [x]


# Normalizations.


def _rms_norm(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    return _norm(bases, node, gain=node.args[1], bias=None, centred=False)


def _layer_norm(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    return _norm(bases, node, gain=node.args[1], bias=node.args[2], centred=True)


def _norm(bases: BasisMap, node: fx.Node, gain: Any, bias: Any, centred: bool) -> list[fx.Node]:
    x = _operand(node, 0)
    whole = _single_feature(bases, x)
    last = (_rank(x) - 1,)
    if whole is not None and whole != last:
        bases.block_all(x, "a norm works on each head by itself")
        out = bases.fresh(node, whole)
        bases.axes.block(out, node.name, "a norm works on each head by itself")
        return [x]
    axis, out = bases.of(x, last), bases.fresh(node, last)
    bases.axes.link(axis, out, {P, R})
    bases.axes.block(axis, node.name, "the mean square of the norm weighs all channels alike", {D})
    vectors = [v for v in (gain, bias) if v is not None]
    if not all(isinstance(v, fx.Node) and v.op == "get_attr" for v in vectors):
        bases.axes.block(axis, node.name, "the norm's gain is computed")
        return [x]
    for vector in vectors:
        bases.port(out, vector, 0, PortRole.GAIN, {P})
        bases.port(out, vector, 0, PortRole.SOURCE, {D})
    if not vectors:
        bases.axes.block(out, node.name, "the norm has no gain to absorb a scale", {D})
    bases.norms.append(Norm(node, axis, centred))
    offender = None if not vectors else gain_offender(node)
    if offender is not None:
        bases.axes.block(axis, node.name, f"the norm's gain feeds {offender}", {R})
    return [x]


def gain_offender(node: fx.Node) -> str | None:
    """What keeps a norm's gain from being folded into its consumers; None if nothing does."""
    for user in node.users:
        if user.op == "output":
            return "an output"
        if user.target is dialect.experts and user.args[0] is node:
            continue
        is_input = user.target is aten.linear.default and user.args[0] is node
        weight = user.args[1] if is_input else None
        if not is_input or not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return format_target(user.target)
    return None


# Elementwise.


def _add(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    if not isinstance(node.args[1], fx.Node) or _is_size(node.args[1]):
        return []
    a, b = _operand(node, 0), _operand(node, 1)
    if a.op == "get_attr" or b.op == "get_attr":
        vector, x = (a, b) if a.op == "get_attr" else (b, a)
        return _add_vector(bases, node, x, vector)
    shared = _aligned(bases, a, b)
    if shared is None:
        return []
    (dims_a, dims_b), dims = shared
    axis = bases.of(a, dims_a)
    bases.axes.link(axis, bases.of(b, dims_b))
    bases.give(node, dims, axis)
    return [a, b]


def _add_vector(bases: BasisMap, node: fx.Node, x: fx.Node, vector: fx.Node) -> list[fx.Node]:
    last = (_rank(node) - 1,)
    if _size(vector, (_rank(vector) - 1,)) != _size(node, last) or _rank(x) != _rank(node):
        return []
    axis = bases.of(x, (_rank(x) - 1,))
    bases.port(axis, vector, _rank(vector) - 1, PortRole.SOURCE)
    bases.give(node, last, axis)
    return [x]


def _multiply(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    other = node.args[1]
    x = _operand(node, 0)
    if not isinstance(other, fx.Node) or _is_size(other):
        return _pass_on(bases, node)
    if x.op == "get_attr":
        x, other = other, x
    if other.op == "get_attr":
        return _gain(bases, node, x, other)
    if _rank(other) == _rank(x):
        for value, factor in ((x, other), (other, x)):
            dims = _single_feature(bases, value)
            if dims is not None and all(_size(factor, (d,)) == 1 for d in dims):
                bases.give(node, dims, bases.of(value, dims))
                return [x, other]
    return _product(bases, node, x, other, families=frozenset({P}))


def _gain(bases: BasisMap, node: fx.Node, x: fx.Node, gain: fx.Node) -> list[fx.Node]:
    if _elements(gain) == 1:
        dims = _single_feature(bases, x)
        if dims is None:
            return []
        bases.give(node, dims, bases.of(x, dims))
        return [x]
    last = (_rank(x) - 1,)
    if _size(gain, (_rank(gain) - 1,)) != _size(x, last) or _elements(gain) != _size(x, last):
        return []
    axis, out = bases.of(x, last), bases.fresh(node, (_rank(node) - 1,))
    vector_axis = _rank(gain) - 1
    bases.axes.link(axis, out, {P})
    bases.port(out, gain, vector_axis, PortRole.GAIN, {P})
    bases.port(axis, gain, vector_axis, PortRole.SINK, {D})
    bases.port(out, gain, vector_axis, PortRole.SOURCE, {D})
    for blocked in (axis, out):
        bases.axes.block(blocked, node.name, "a gain works on single channels", {R})
    return [x]


def _gated_act(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    return _product(bases, node, _operand(node, 1), _operand(node, 0), families=frozenset({P}))


def _product(
    bases: BasisMap, node: fx.Node, linear: fx.Node, other: fx.Node, families: frozenset[Family]
) -> list[fx.Node]:
    """``linear * f(other)``: both permute together, only the first may be scaled."""
    shared = _aligned(bases, linear, other)
    if shared is None:
        return []
    (dims, dims_other), out_dims = shared
    axis, gate = bases.of(linear, dims), bases.of(other, dims_other)
    bases.axes.link(axis, gate, families)
    out = bases.fresh(node, out_dims)
    bases.axes.link(axis, out, families | {D})
    for blocked in (axis, gate, out):
        bases.axes.block(blocked, node.name, "channels are multiplied one by one", {R})
    bases.axes.block(gate, node.name, "a nonlinear function of it is multiplied", {D})
    return [linear, other]


def _act(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, kind = _operand(node, 0), node.args[1]
    return _activation(bases, node, x, str(kind), homogeneous=kind in ("relu", "identity"))


def _aten_activation(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    name = format_target(node.target).removeprefix("aten.")
    return _activation(bases, node, _operand(node, 0), name, homogeneous=name == "relu")


def _activation(
    bases: BasisMap, node: fx.Node, x: fx.Node, kind: str, *, homogeneous: bool
) -> list[fx.Node]:
    for dims, axis in list(bases.features.get(x, {}).items()):
        out = bases.fresh(node, dims)
        kept = {P, D} if homogeneous else {P}
        bases.axes.link(axis, out, kept)
        for blocked in (axis, out):
            bases.axes.block(
                blocked, node.name, f"{kind} works on single channels", ALL_FAMILIES - kept
            )
    return [x]


# Attention.


def _rope(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, cos = _operand(node, 0), _operand(node, 1)
    dims = _single_feature(bases, x)
    if dims is None or 3 not in dims:
        return []
    axis = bases.of(x, dims)
    bases.axes.cut(axis, _size(x, (3,)))
    bases.axes.pair(axis, _size(cos, (_rank(cos) - 1,)), bool(node.args[3]))
    reason = "a rotary embedding mixes channels in pairs"
    bases.axes.block(axis, node.name, reason, {P, R})
    bases.give(node, dims, axis)
    return [x]


def _kv_append(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    past, new = _operand(node, 0), _operand(node, 1)
    dims = _single_feature(bases, new)
    if dims is None:
        return []
    bases.give(node, dims, bases.of(new, dims))
    return [past, new]


def _attention(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    query, key, value = (_operand(node, i) for i in range(3))
    heads, kv_heads = _size(query, (1,)), _size(key, (1,))
    axes = [_head_axis(bases, x) for x in (query, key, value)]
    out = bases.fresh(node, (1, 3))
    width, value_width = _size(query, (3,)), _size(value, (3,))
    for head in range(heads):
        shared = head // (heads // kv_heads)
        starts = {"a_start": shared * width, "b_start": head * width, "size": width}
        bases.axes.link(axes[1], axes[0], dual=True, **starts)
        bases.axes.link(
            axes[2],
            out,
            a_start=shared * value_width,
            b_start=head * value_width,
            size=value_width,
        )
    return [query, key, value]


def _head_axis(bases: BasisMap, x: fx.Node) -> int:
    """The axis of heads side by side."""
    dims = _single_feature(bases, x)
    if dims == (1, 3) or _size(x, (1,)) != 1 or dims is None:
        return bases.of(x, (1, 3))
    axis = bases.of(x, dims)  # one head: its axis of size 1 may have been dropped
    bases.give(x, (1, 3), axis)
    return axis


# Movements.


def _pass_on(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    """The result has the axes of its only tensor operand, dimension by dimension."""
    x = _operand(node, 0)
    for dims, axis in bases.features.get(x, {}).items():
        bases.give(node, dims, axis)
    return [x]


def _transpose(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, rank = _operand(node, 0), _rank(node)
    first, second = (int(d) % rank for d in node.args[1:3])  # type: ignore[call-overload]
    order = {first: second, second: first}
    return _move(bases, node, x, lambda d: order.get(d, d))


def _permute(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, rank = _operand(node, 0), _rank(node)
    order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, call-overload, arg-type]
    return _move(bases, node, x, order.index)


def _unsqueeze(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, rank = _operand(node, 0), _rank(node)
    at = int(node.args[1]) % rank  # type: ignore[call-overload]
    return _move(bases, node, x, lambda d: d + (d >= at))


def _squeeze(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x = _operand(node, 0)
    at = int(node.args[1]) % _rank(x)  # type: ignore[call-overload]
    if any(at in dims for dims in bases.features.get(x, {})):
        return []
    return _move(bases, node, x, lambda d: d - (d > at))


def _move(
    bases: BasisMap, node: fx.Node, x: fx.Node, where: Callable[[int], int]
) -> list[fx.Node]:
    for dims, axis in list(bases.features.get(x, {}).items()):
        bases.give(node, tuple(where(d) for d in dims), axis)
    return [x]


def _view(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    """Keeps an axis whose dimensions are split or joined without touching others."""
    x = _operand(node, 0)
    kept = True
    for dims, axis in list(bases.features.get(x, {}).items()):
        found = _same_span(x, dims, node)
        if found is None:
            kept = False
        else:
            bases.give(node, found, axis)
            for width in (_inner_size(x, dims), _inner_size(node, found)):
                bases.axes.cut(axis, width)
    return [x] if kept else []


def _same_span(x: fx.Node, dims: Dims, node: fx.Node) -> Dims | None:
    """The dimensions of `node` that hold what adjacent `dims` hold in `x`."""
    if list(dims) != list(range(dims[0], dims[-1] + 1)):
        return None
    behind = 1
    for d in range(dims[-1] + 1, _rank(x)):
        if not isinstance(x.meta["val"].shape[d], int):
            return None
        behind *= _size(x, (d,))
    wanted, found, product = _size(x, dims), list[int](), 1
    for d in reversed(range(_rank(node))):
        size = node.meta["val"].shape[d]
        if not isinstance(size, int):
            return None
        if behind > 1 or (behind == 1 and size == 1 and not found and product == wanted):
            if behind % size:
                return None
            behind //= size
            continue
        found.insert(0, d)
        product *= size
        if product == wanted:
            return tuple(found)
        if product > wanted:
            return None
    return None


def _inner_size(node: fx.Node, dims: Dims) -> int:
    return _size(node, dims[-1:]) if len(dims) > 1 else _size(node, dims)


def _slice(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x = _operand(node, 0)
    dim, start, end, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    dim = int(dim) % _rank(x)  # type: ignore[call-overload]
    for dims, axis in list(bases.features.get(x, {}).items()):
        if dim not in dims:
            bases.give(node, dims, axis)
        elif dims == (dim,) and step == 1 and isinstance(start or 0, int):
            _take(bases, node, dims, axis, int(start or 0) % bases.axes.sizes[axis])  # type: ignore[call-overload]
        else:
            return []
    return [x]


def _take(bases: BasisMap, node: fx.Node, dims: Dims, axis: int, start: int) -> None:
    part = bases.fresh(node, dims)
    bases.axes.link(axis, part, a_start=start, size=bases.axes.sizes[part])


def _getitem(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    """A piece of a split; other operators with several results block their operands."""
    parts, index = node.args
    assert isinstance(parts, fx.Node)
    if parts.target not in SPLITS or not isinstance(index, int):
        return []
    x = _operand(parts, 0)
    dim = _split_dim(parts)
    for dims, axis in list(bases.features.get(x, {}).items()):
        if dim not in dims:
            bases.give(node, dims, axis)
        elif dims == (dim,):
            sizes = [int(part.shape[dim]) for part in parts.meta["val"][:index]]
            _take(bases, node, dims, axis, sum(sizes))
        else:
            bases.axes.block(axis, node.name, "heads are split unevenly")
    return [parts]


def _split(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    del bases
    return [_operand(node, 0)]


def _split_dim(node: fx.Node) -> int:
    dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return int(dim) % _rank(_operand(node, 0))


def _cat(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    operands: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim = int(dim) % _rank(node)
    for dims in {dims for x in operands for dims in bases.features.get(x, {})}:
        if dims == (dim,):
            out, start = bases.fresh(node, dims), 0
            for x in operands:
                part = bases.of(x, dims)
                bases.axes.link(out, part, a_start=start, size=bases.axes.sizes[part])
                start += bases.axes.sizes[part]
        elif dim not in dims:
            axes = [bases.of(x, dims) for x in operands]
            for other in axes[1:]:
                bases.axes.link(axes[0], other)
            bases.give(node, dims, axes[0])
        else:
            return []
    return operands


def _reduce(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    """A mean or sum over dimensions that are no features."""
    x = _operand(node, 0)
    dims: Any = node.args[1] if len(node.args) > 1 else None
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    if dims is None:
        return []
    reduced = sorted(int(d) % _rank(x) for d in dims)
    if any(d in reduced for feature in bases.features.get(x, {}) for d in feature):
        return []
    return _move(bases, node, x, lambda d: d if keep else d - sum(r < d for r in reduced))


def _index_select(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x = _operand(node, 0)
    dim = int(node.args[1]) % _rank(x)  # type: ignore[call-overload]
    if any(dim in dims for dims in bases.features.get(x, {})):
        return []
    return _pass_on(bases, node)


SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})

RULES: dict[Any, Rule] = {
    aten.linear.default: _linear,
    aten.conv2d.default: _convolution,
    aten.conv1d.default: _convolution,
    aten.embedding.default: _embedding,
    dialect.experts: _experts,
    dialect.rms_norm: _rms_norm,
    dialect.layer_norm: _layer_norm,
    dialect.rope: _rope,
    dialect.kv_append: _kv_append,
    dialect.attention: _attention,
    dialect.act: _act,
    dialect.gated_act: _gated_act,
    aten.relu.default: _aten_activation,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.mul.Tensor: _multiply,
    aten.div.Tensor: _multiply,
    aten.neg.default: _pass_on,
    aten.to.dtype: _pass_on,
    aten.clone.default: _pass_on,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten.flatten.using_ints: _view,
    aten.slice.Tensor: _slice,
    operator.getitem: _getitem,
    aten.cat.default: _cat,
    aten.mean.dim: _reduce,
    aten.sum.dim_IntList: _reduce,
    aten.index_select.default: _index_select,
    **dict.fromkeys(SPLITS, _split),
}
"""The declaration of every operator that lets some transform through."""


# Helpers.


def _aligned(bases: BasisMap, a: fx.Node, b: fx.Node) -> tuple[tuple[Dims, Dims], Dims] | None:
    """The feature dimensions that two operands of an elementwise operator share."""
    rank = max(_rank(a), _rank(b))
    dims_a, dims_b = _single_feature(bases, a), _single_feature(bases, b)
    lifted = {
        tuple(d + rank - _rank(x) for d in dims)
        for x, dims in ((a, dims_a), (b, dims_b))
        if dims is not None
    }
    if len(lifted) != 1:
        return None
    (dims,) = lifted
    here = [tuple(d - rank + _rank(x) for d in dims) for x in (a, b)]
    if any(min(d, default=-1) < 0 for d in here):
        return None
    if _size(a, here[0]) != _size(b, here[1]):
        return None
    return (here[0], here[1]), dims


def _single_feature(bases: BasisMap, node: fx.Node) -> Dims | None:
    known = bases.features.get(node, {})
    return next(iter(known)) if len(known) == 1 else None


def _operand(node: fx.Node, position: int) -> fx.Node:
    value = node.args[position]
    assert isinstance(value, fx.Node)
    return value


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape)


def _size(node: fx.Node, dims: Dims) -> int:
    """The size of an axis; -1 if a dimension of it is symbolic."""
    product = 1
    for d in dims:
        size = node.meta["val"].shape[d]
        if not isinstance(size, int):
            return -1
        product *= size
    return product


def _elements(node: fx.Node) -> int:
    return _size(node, tuple(range(_rank(node))))


def _is_size(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, (Tensor, list, tuple))


def _origin(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"it is the input '{node.target}'"
    return f"it comes from {format_target(node.target)}" if node.op == "call_function" else "a weight"
