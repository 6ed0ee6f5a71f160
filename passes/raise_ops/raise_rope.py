"""Rotary position embeddings, recognized by what they compute."""

from __future__ import annotations

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


class RaiseRope(Pass):
    """Makes each rotation of queries and keys one operator.

    1. ``x * cos + pairing(x) * sin``, if probing `x` with random numbers and the positional
       operands with those of random positions gives a rotation in planes
       =>  ``qc.rope(x, cos, sin, interleaved)`` with one column of the tables per plane
    2. ``cat([rope(x[..., :R]), x[..., R:]])``  =>  ``rope(x)``
    """

    requires = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Raises what probing accepts; sums that merely look alike are left alone."""
        result = PassResult()
        editor = Editor(program)
        data = data_nodes(program)
        probe = Probe(program, context.seed)
        for exit_node in program.calls(aten.add.Tensor, aten.sub.Tensor, aten.cat.default):
            tables = _tables(exit_node, data)
            if tables is None:
                continue
            new = _match_rotation(editor, probe, data, exit_node, tables)
            if new is not None:
                editor.replace(exit_node, new)
                data.add(new)
                result.rewrites += 1
        for node in program.calls(dialect.rope):
            result.rewrites += _widen(editor, node)
        return result


def _tables(exit_node: fx.Node, data: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The positional factors of the two products that meet in `exit_node`."""
    if exit_node not in data or exit_node.target is aten.cat.default:
        return None
    tables = []
    for operand in exit_node.args[:2]:
        if not isinstance(operand, fx.Node) or operand.target is not aten.mul.Tensor:
            return None
        positional = [
            n for n in operand.args if isinstance(n, fx.Node) and n not in data and _is_table(n)
        ]
        if len(positional) != 1:
            return None
        tables.append(positional[0])
    return tables[0], tables[1]


def _is_table(node: fx.Node) -> bool:
    value = node.meta["val"]
    return node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point()


def _match_rotation(
    editor: Editor,
    probe: Probe,
    data: set[fx.Node],
    exit_node: fx.Node,
    tables: tuple[fx.Node, fx.Node],
) -> fx.Node | None:
    shape = exit_node.meta["val"].shape
    if len(shape) != 4 or not isinstance(shape[-1], int) or shape[-1] % 2:
        return None
    for entry in dominators(exit_node, data, limit=12)[:4]:
        if str(getattr(entry.meta["val"], "shape", None)) != str(shape):
            continue
        half = shape[-1] // 2
        for interleaved in (False, True):
            columns = (0, 2 * half, 2) if interleaved else (0, half, 1)
            try:
                accepted = _is_rotation(probe, entry, exit_node, tables, columns, interleaved)
            except NotClosedError:
                return None
            if accepted:
                with editor.before(exit_node):
                    cos, sin = (_plane_table(editor, table, columns) for table in tables)
                    return editor.call(dialect.rope, entry, cos, sin, interleaved)
    return None


def _is_rotation(
    probe: Probe,
    entry: fx.Node,
    exit_node: fx.Node,
    tables: tuple[fx.Node, fx.Node],
    columns: tuple[int, int, int],
    interleaved: bool,
) -> bool:
    """Runs the region on random `x` and tables of random angles per plane."""
    x = probe.random(entry)
    given: dict[fx.Node, Any] = {entry: x}
    angles: list[Tensor] = []
    for table, function in zip(tables, (torch.cos, torch.sin), strict=True):
        shape = probe.shape(table)
        planes = (x.shape[-1] // 2,)
        if shape[-1] != x.shape[-1] or len(shape) not in (3, 4):
            return False
        if not angles:
            angles.append(probe.random(table)[..., : planes[0]])
        full = (
            angles[0].repeat_interleave(2, dim=-1)
            if interleaved
            else torch.cat((angles[0], angles[0]), dim=-1)
        )
        given[table] = function(full)
    found = probe.run(exit_node, given)
    cos, sin = (_squeeze_heads(given[table])[..., slice(*columns)] for table in tables)
    if relative_error(found, rope(x, cos, sin, interleaved)) > TOLERANCE:
        return False
    return all(_repeats(probe, table, interleaved) for table in tables)


def _repeats(probe: Probe, table: fx.Node, interleaved: bool) -> bool:
    """Whether the real table has the same number for both channels of each plane."""
    given = {
        node: torch.arange(torch.Size(probe.shape(node)).numel()).reshape(probe.shape(node))
        for node in probe.program.inputs
        if node.meta["val"].dtype == torch.int64
    }
    values = probe.run(table, given)
    if interleaved:
        return relative_error(values[..., 0::2], values[..., 1::2]) <= TOLERANCE
    half = values.shape[-1] // 2
    return relative_error(values[..., :half], values[..., half:]) <= TOLERANCE


def _plane_table(editor: Editor, table: fx.Node, columns: tuple[int, int, int]) -> fx.Node:
    """``[B, 1, S, R]`` or ``[B, S, R]``  to  ``[B, S, R/2]``."""
    if len(table.meta["val"].shape) == 4:
        if table.target is aten.unsqueeze.default and table.args[1] == 1:
            table = table.args[0]  # type: ignore[assignment]
        else:
            table = editor.call(aten.squeeze.dim, table, 1)
    return editor.call(aten.slice.Tensor, table, -1, *columns)


def _squeeze_heads(table: Tensor) -> Tensor:
    return table.squeeze(1) if table.dim() == 4 else table


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
