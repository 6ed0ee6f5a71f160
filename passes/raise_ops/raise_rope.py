"""Rotary position embeddings, recognized by what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.kernels.rope.reference import rope
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult
from qcompile.passes.raise_ops.regions import (
    TOLERANCE,
    NotClosedError,
    Probe,
    data_nodes,
    dominators,
    relative_error,
)

aten = torch.ops.aten

_EXITS = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.cat.default,
    aten.flatten.using_ints,
    aten.reshape.default,
)
_MAX_REGION = 24
"""Operators that a rotation may be spelled with."""


class RaiseRope(Pass):
    """Makes each rotation of queries and keys one operator.

    1. a region from `x` to a value of its shape that also reads one or two positional tables, if
       probing `x` with random numbers and the tables with those of random angles gives a rotation
       in planes  =>  ``qc.rope(x, cos, sin, interleaved)`` with one column per plane
    2. ``cat([rope(x[..., :R]), x[..., R:]])``  =>  ``rope(x)``

    A region with heads behind positions is rotated between two transpositions; one that stores
    the rotated pairs apart is followed by that permutation.
    """

    requires = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Raises what probing accepts; what merely looks alike is left alone."""
        result = PassResult()
        editor = Editor(program)
        for pairs in program.calls(aten.view_as_complex.default):
            _keep_channels(editor, pairs)
        data = data_nodes(program)
        probe = Probe(program, context.seed)
        for exit_node in program.calls(*_EXITS):
            new = _raise(editor, probe, data, exit_node)
            if new is not None:
                editor.replace(exit_node, new)
                data |= {new, *new.all_input_nodes}
                result.rewrites += 1
        program.graph.eliminate_dead_code()
        for node in program.calls(dialect.rope):
            result.rewrites += _widen(editor, node)
        return result


@dataclass(frozen=True)
class _Table:
    """A positional operand of a rotation.

    Attributes:
        node: Broadcast over heads, ``[.., S, .., W]``.
        heads_axis: The axis of size 1 that stands for the heads, or None if there is none.
        polar: For a complex table ``factor * polar(radius, angle)``, that call.
        factor: That number.
    """

    node: fx.Node
    heads_axis: int | None
    polar: fx.Node | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class _Rotation:
    """How a region rotates.

    Attributes:
        cos: The table of cosines.
        sin: The table of sines; the same one when it is complex.
        columns: (start, step) of the columns that hold one number per plane.
        interleaved: As in `qc.rope`.
        negated: Whether it rotates the other way.
        apart: Whether pairs ``(2j, 2j + 1)`` come out as ``(j, j + R/2)``.
    """

    cos: _Table
    sin: _Table
    columns: tuple[int, int]
    interleaved: bool
    negated: bool
    apart: bool


def _keep_channels(editor: Editor, pairs: fx.Node) -> None:
    """Lets ``[B, H, S, R]`` appear as a value before its channels are read as pairs.

    One reshape may have split heads and pairs at once; a rotation needs what lies between.
    """
    split = pairs.args[0]
    if not isinstance(split, fx.Node) or split.target is not aten.reshape.default:
        return
    source, sizes = split.args
    planes = split.meta["val"].shape[-2]
    if not isinstance(source, fx.Node) or not isinstance(sizes, list | tuple):
        return
    if isinstance(planes, int) and source.meta["val"].dim() != len(sizes) - 1:
        with editor.before(split):
            whole = editor.call(aten.reshape.default, source, [*sizes[:-2], 2 * planes])
        split.args = (whole, [*sizes[:-2], planes, 2])


def _raise(editor: Editor, probe: Probe, data: set[fx.Node], exit_node: fx.Node) -> fx.Node | None:
    shape: tuple[Any, ...] = getattr(exit_node.meta["val"], "shape", ())
    if exit_node not in data or len(shape) != 4:
        return None
    if not isinstance(shape[-1], int) or shape[-1] % 2 or shape[-1] < 2:
        return None
    for entry in dominators(exit_node, data, limit=16)[:6]:
        if [str(size) for size in entry.meta["val"].shape] != [str(size) for size in shape]:
            continue
        tables = _tables(exit_node, entry, data)
        if tables is None:
            continue
        try:
            rotation = _match(probe, entry, exit_node, tables)
        except (NotClosedError, RuntimeError):
            return None
        if rotation is not None:
            with editor.before(exit_node):
                return _emit(editor, entry, rotation)
    return None


def _tables(exit_node: fx.Node, entry: fx.Node, data: set[fx.Node]) -> list[_Table] | None:
    """The positional operands of a region; None if it is too large or they cannot be tables."""
    found: list[fx.Node] = []
    seen, pending = set[fx.Node](), [exit_node]
    while pending:
        node = pending.pop()
        if node in seen or node is entry:
            continue
        seen.add(node)
        for operand in node.all_input_nodes:
            if operand in data:
                pending.append(operand)
            elif isinstance(operand.meta["val"], Tensor) and operand not in found:
                found.append(operand)
    if len(seen) > _MAX_REGION or not 1 <= len(found) <= 2:
        return None
    tables = [_as_table(node, int(entry.meta["val"].shape[-1])) for node in found]
    if any(table is None for table in tables) or len({t.heads_axis for t in tables if t}) != 1:
        return None
    is_complex = [table.polar is not None for table in tables if table]
    return [t for t in tables if t] if is_complex in ([True], [False, False]) else None


def _as_table(node: fx.Node, width: int) -> _Table | None:
    value = node.meta["val"]
    if node.op != "call_function" or value.dim() not in (2, 4):
        return None
    if value.shape[-1] not in (width, width // 2):
        return None
    heads_axis = None
    if value.dim() == 4:
        axes = [axis for axis in (1, 2) if isinstance(value.shape[axis], int)]
        axes = [axis for axis in axes if value.shape[axis] == 1]
        if len(axes) != 1:
            return None
        heads_axis = axes[0]
    if not value.is_complex():
        return _Table(node, heads_axis) if value.is_floating_point() else None
    polar, factor = node, 1.0
    while polar.target in (aten.unsqueeze.default, aten.to.dtype, aten.mul.Tensor):
        if polar.target is aten.mul.Tensor:
            if not isinstance(polar.args[1], (int, float)):
                return None
            factor *= polar.args[1]
        polar = polar.args[0]  # type: ignore[assignment]
    if polar.target is not aten.polar.default or polar.meta["val"].dim() != 3:
        return None
    return _Table(node, heads_axis, polar, factor)


def _match(
    probe: Probe, entry: fx.Node, exit_node: fx.Node, tables: list[_Table]
) -> _Rotation | None:
    """Runs the region on random `x` and tables of random angles per plane."""
    x = probe.random(entry)
    width = x.shape[-1]
    heads_last = tables[0].heads_axis == 2
    wide = probe.shape(tables[0].node)[-1] == width
    if any((probe.shape(table.node)[-1] == width) != wide for table in tables):
        return None
    angle = probe.random(tables[0].node).real[..., : width // 2]
    plain = angle.squeeze(tables[0].heads_axis) if tables[0].heads_axis else angle.unsqueeze(0)
    for columns in ((0, 1), (0, 2)) if wide else ((0, 1),):
        spread = _spread(angle, columns) if wide else angle
        for cos, sin in _roles(tables):
            given: dict[fx.Node, Any] = {entry: x}
            if cos.polar is not None:
                given[cos.node] = torch.polar(torch.ones_like(spread), spread)
            else:
                given |= {cos.node: spread.cos(), sin.node: spread.sin()}
            found = probe.run(exit_node, given)
            for interleaved, negated, apart in _variants():
                expected = rope(
                    x.transpose(1, 2) if heads_last else x,
                    plain.cos(),
                    -plain.sin() if negated else plain.sin(),
                    interleaved,
                )
                if apart:
                    expected = torch.cat((expected[..., 0::2], expected[..., 1::2]), dim=-1)
                if heads_last:
                    expected = expected.transpose(1, 2)
                if relative_error(found, expected) > TOLERANCE:
                    continue
                if not _rotates(probe, cos, sin, columns if wide else None):
                    return None
                return _Rotation(cos, sin, columns, interleaved, negated, apart)
    return None


def _roles(tables: list[_Table]) -> Iterator[tuple[_Table, _Table]]:
    if len(tables) == 1:
        yield tables[0], tables[0]
    else:
        yield tables[0], tables[1]
        yield tables[1], tables[0]


def _variants() -> Iterator[tuple[bool, bool, bool]]:
    """Interleaved, negated, apart: pairs can only be put apart if they were neighbours."""
    for interleaved, negated, apart in product((False, True), repeat=3):
        if interleaved or not apart:
            yield interleaved, negated, apart


def _spread(angle: Tensor, columns: tuple[int, int]) -> Tensor:
    """A number per plane as a number per channel."""
    if columns[1] == 2:
        return angle.repeat_interleave(2, dim=-1)
    return torch.cat((angle, angle), dim=-1)


def _rotates(probe: Probe, cos: _Table, sin: _Table, columns: tuple[int, int] | None) -> bool:
    """Whether the real tables hold cosines and sines, up to one factor for all.

    Args:
        probe: Runs the tables on the positions 0, 1, 2, ...
        cos: The table of cosines.
        sin: The table of sines.
        columns: Where a plane's number stands if both of its channels have a column.
    """
    given = {}
    for node in probe.program.inputs:
        if node.meta["val"].dtype == torch.int64:
            shape = probe.shape(node)
            given[node] = torch.arange(torch.Size(shape).numel()).reshape(shape)
    tables = [probe.run(table.node, given) for table in (cos, sin)]
    if columns is not None and not all(_repeats(table, columns) for table in tables):
        return False
    squares = tables[0].abs().square()
    if cos.polar is None:
        squares = squares + tables[1].square()
    return float(squares.min()) > 0 and float(squares.max() / squares.min()) - 1 <= TOLERANCE


def _repeats(values: Tensor, columns: tuple[int, int]) -> bool:
    """Whether a table has the same number for both channels of each plane."""
    half = values.shape[-1] // 2
    if columns[1] == 2:
        return relative_error(values[..., 0::2], values[..., 1::2]) <= TOLERANCE
    return relative_error(values[..., :half], values[..., half:]) <= TOLERANCE


def _emit(editor: Editor, entry: fx.Node, rotation: _Rotation) -> fx.Node:
    width = int(entry.meta["val"].shape[-1])
    cos = _plane_table(editor, rotation.cos, rotation.columns, width, aten.cos.default)
    sin = _plane_table(editor, rotation.sin, rotation.columns, width, aten.sin.default)
    if rotation.negated:
        sin = editor.call(aten.neg.default, sin)
    heads_last = rotation.cos.heads_axis == 2
    x = editor.call(aten.transpose.int, entry, 1, 2) if heads_last else entry
    new = editor.call(dialect.rope, x, cos, sin, rotation.interleaved)
    if rotation.apart:
        halves = [editor.call(aten.slice.Tensor, new, -1, i, width, 2) for i in (0, 1)]
        new = editor.call(aten.cat.default, halves, -1)
    return editor.call(aten.transpose.int, new, 1, 2) if heads_last else new


def _plane_table(
    editor: Editor, table: _Table, columns: tuple[int, int], width: int, function: Any
) -> fx.Node:
    """A table as ``[B or 1, S, R/2]``."""
    if table.polar is not None:
        radius, angle = table.polar.args
        part = editor.call(aten.mul.Tensor, radius, editor.call(function, angle))
        return part if table.factor == 1 else editor.call(aten.mul.Tensor, part, table.factor)
    node = table.node
    if table.heads_axis is None:
        node = editor.call(aten.unsqueeze.default, node, 0)
    elif node.target is aten.unsqueeze.default and node.args[1] == table.heads_axis:
        node = node.args[0]  # type: ignore[assignment]
    else:
        node = editor.call(aten.squeeze.dim, node, table.heads_axis)
    if node.meta["val"].shape[-1] != width:
        return node
    start, step = columns
    end = width if step == 2 else width // 2
    return editor.call(aten.slice.Tensor, node, -1, start, end, step)


def _widen(editor: Editor, node: fx.Node) -> int:
    """Lets the operator pass the channels through that are not rotated."""
    rotated, cos, sin, interleaved = node.args
    if not isinstance(rotated, fx.Node) or len(node.users) != 1:
        return 0
    (join,) = node.users
    if join.target is not aten.cat.default or join.args[1] not in (-1, 3):
        return 0
    parts = list(join.args[0])  # type: ignore[arg-type]
    if len(parts) != 2 or parts[0] is not node:
        return 0
    whole = _split_source(rotated, parts[1], int(rotated.meta["val"].shape[-1]))
    if whole is None:
        return 0
    with editor.before(join):
        new = editor.call(dialect.rope, whole, cos, sin, interleaved)
    editor.replace(join, new)
    editor.graph.erase_node(node)
    return 1


def _split_source(first: fx.Node, rest: Any, width: int) -> fx.Node | None:
    """What `first` and `rest` are the two parts of, if they are slices of one value."""
    if not isinstance(rest, fx.Node):
        return None
    if first.target is aten.slice.Tensor and rest.target is aten.slice.Tensor:
        whole, rank = first.args[0], len(first.meta["val"].shape)
        same = whole is rest.args[0]
        axes = all(n.args[1] in (-1, rank - 1) for n in (first, rest))
        fits = rest.args[2] == width and first.args[2] in (0, None) and first.args[3] == width
        return whole if same and axes and fits else None  # type: ignore[return-value]
    return None
