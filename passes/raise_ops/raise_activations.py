"""Activations as one operator each."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.kernels.gated_act.reference import ACTIVATIONS, act
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

_ANCHORS = (
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.erf.default,
)

_REACH = 4
"""How many operators a spelled-out activation may go on after its anchor."""


class RaiseActivations(Pass):
    """Names every activation by its values.

    An elementwise region of one value around `silu`, `gelu`, `relu`, `sigmoid`, `tanh` or `erf`,
    if it computes one of the known activations  =>  ``qc.act(x, kind)``.
    """

    requires = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Raises the widest region around each anchor that is a known activation."""
        result = PassResult()
        editor = Editor(program)
        data = data_nodes(program)
        probe = Probe(program, context.seed)
        for anchor in program.calls(*_ANCHORS):
            if anchor in data and anchor.users:
                _raise(editor, probe, data, anchor, result)
        return result


def _raise(
    editor: Editor, probe: Probe, data: set[fx.Node], anchor: fx.Node, result: PassResult
) -> None:
    for exit_node in reversed(_forward(anchor)):
        for entry in dominators(exit_node, data, limit=12)[:8]:
            if entry.meta["val"].shape != exit_node.meta["val"].shape:
                continue
            kind = _kind(probe, entry, exit_node)
            if kind is not None:
                with editor.before(exit_node):
                    new = editor.call(dialect.act, entry, kind)
                editor.replace(exit_node, new)
                data.add(new)
                result.rewrites += 1
                return


def _forward(anchor: fx.Node) -> list[fx.Node]:
    """The anchor and the single-user arithmetic that follows it."""
    chain = [anchor]
    while len(chain) <= _REACH and len(chain[-1].users) == 1:
        (user,) = chain[-1].users
        if user.target not in (aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor):
            break
        chain.append(user)
    return chain


def _kind(probe: Probe, entry: fx.Node, exit_node: fx.Node) -> str | None:
    """Which activation leads from `entry` to `exit_node`, if one does."""
    x = 3 * probe.random(entry)
    try:
        found = probe.run(exit_node, {entry: x})
    except NotClosedError:
        return None
    if not isinstance(found, Tensor):
        return None
    for kind in ACTIVATIONS:
        if kind != "identity" and relative_error(found, act(x, kind)) <= TOLERANCE:
            return kind
    return None
