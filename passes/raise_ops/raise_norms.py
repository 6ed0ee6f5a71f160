"""Normalizations, recognized by what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.kernels.layer_norm.reference import layer_norm
from qcompile.kernels.rms_norm.reference import rms_norm
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult, Skip
from qcompile.passes.raise_ops.regions import (
    REASON,
    TOLERANCE,
    NotClosedError,
    Probe,
    data_nodes,
    dominators,
    relative_error,
    snap,
)

aten = torch.ops.aten

_INVERSE_ROOTS = (aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar)


class RaiseNorms(Pass):
    """Makes every normalization over the last axis one operator.

    1. ``layer_norm``, ``rms_norm`` of ATen            =>  ``qc.layer_norm``, ``qc.rms_norm``
    2. a region from `x` to ``x * f(x)`` around an inverse root, if it computes a normalization
       =>  ``qc.rms_norm(x, None, eps)`` or ``qc.layer_norm(x, None, None, eps)``
    3. ``mul(norm, gain)``, ``add(norm, bias)`` with vectors as weights  =>  into the operator
    """

    requires = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Raises what probing accepts; the rest stays, with its reason."""
        result = PassResult()
        editor = Editor(program)
        for node in program.calls(aten.layer_norm.default, aten.rms_norm.default):
            _raise_native(editor, node, result)
        data = data_nodes(program)
        probe = Probe(program, context.seed)
        for anchor in program.calls(*_INVERSE_ROOTS):
            if anchor in data and _is_inverse_root(anchor):
                _raise_region(editor, probe, data, anchor, result)
        program.graph.eliminate_dead_code()
        for node in program.calls(dialect.rms_norm, dialect.layer_norm):
            _absorb_affine(editor, node, result)
        return result


def _raise_native(editor: Editor, node: fx.Node, result: PassResult) -> None:
    x, shape, *rest = node.args
    if len(shape) != 1:  # type: ignore[arg-type]
        result.skips.append(Skip(node.name, "normalizes over more than the last axis"))
        return
    optional: list[Any] = [*rest, *[None] * 3]
    with editor.before(node):
        if node.target is aten.layer_norm.default:
            eps = optional[2] if optional[2] is not None else 1e-5
            new = editor.call(dialect.layer_norm, x, optional[0], optional[1], eps)
        else:
            eps = optional[1] if optional[1] is not None else torch.finfo(torch.float32).eps
            new = editor.call(dialect.rms_norm, x, optional[0], eps)
    editor.replace(node, new)
    result.rewrites += 1


def _is_inverse_root(node: fx.Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar and node.args[1] not in (-0.5, 0.5):
        return False
    shape = node.meta["val"].shape
    return len(shape) >= 2 and shape[-1] == 1


def _raise_region(
    editor: Editor, probe: Probe, data: set[fx.Node], anchor: fx.Node, result: PassResult
) -> None:
    for exit_node in _exits(anchor):
        shape = exit_node.meta["val"].shape
        if not isinstance(shape[-1], int):
            continue
        new = None
        for entry in dominators(exit_node, data, limit=16)[:4]:
            if [str(size) for size in entry.meta["val"].shape] != [str(size) for size in shape]:
                continue
            # A root mean square of what was centred just before is a layer norm from further on.
            new = _match_norm(editor, probe, entry, anchor, exit_node) or new
            if new is not None and entry.target is not aten.sub.Tensor:
                break
        if new is not None:
            editor.replace(exit_node, new)
            data.add(new)
            result.rewrites += 1
            return
    anchor.meta[REASON] = "an inverse root that is no normalization of one value"


def _exits(anchor: fx.Node) -> list[fx.Node]:
    """Where the root meets the full-width value: products, quotients, or one step further."""
    found = []
    for user in anchor.users:
        if user.target in (aten.mul.Tensor, aten.div.Tensor):
            found.append(user)
        elif user.target in (aten.reciprocal.default, aten.add.Tensor):
            found += [u for u in user.users if u.target in (aten.mul.Tensor, aten.div.Tensor)]
    return found


def _match_norm(
    editor: Editor, probe: Probe, entry: fx.Node, anchor: fx.Node, exit_node: fx.Node
) -> fx.Node | None:
    try:
        x = probe.random(entry)
        found = probe.run(exit_node, {entry: x})
        at_zero = probe.run(anchor, {entry: torch.zeros_like(x)})
    except NotClosedError:
        return None
    root = float(at_zero.flatten()[0])
    if not (root > 0 and root != float("inf")):
        return None
    eps = root**2 if _is_plain_root(anchor) else root**-2
    eps = snap(eps, _between(entry, anchor))
    candidates = (
        (rms_norm(x, None, eps), dialect.rms_norm, (entry, None, eps)),
        (layer_norm(x, None, None, eps), dialect.layer_norm, (entry, None, None, eps)),
    )
    for expected, operator, arguments in candidates:
        if relative_error(found, expected) <= TOLERANCE:
            small = 1e-3 * x
            if (
                relative_error(
                    probe.run(exit_node, {entry: small}), operator(small, *arguments[1:])
                )
                > 1e3 * TOLERANCE
            ):
                continue
            with editor.before(exit_node):
                return editor.call(operator, *arguments)
    return None


def _is_plain_root(anchor: fx.Node) -> bool:
    is_square_root = anchor.target is aten.pow.Tensor_Scalar and anchor.args[1] == 0.5
    return anchor.target is aten.sqrt.default or bool(is_square_root)


def _between(entry: fx.Node, anchor: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    pending = [anchor]
    while pending:
        node = pending.pop()
        if node is not entry and node not in found and len(found) < 32:
            found.append(node)
            pending.extend(node.all_input_nodes)
    return found


def _absorb_affine(editor: Editor, node: fx.Node, result: PassResult) -> None:
    """Moves a gain, then for layer norm a bias, from the only user into the operator."""
    while len(node.users) == 1:
        (user,) = node.users
        vector = next((n for n in user.all_input_nodes if n.op == "get_attr"), None)
        if vector is None or len(user.args) != 2 or user.kwargs:
            return
        if tuple(vector.meta["val"].shape) != tuple(node.meta["val"].shape[-1:]):
            return
        is_layer_norm = node.target is dialect.layer_norm
        has_gain = node.args[1] is not None
        if user.target is aten.mul.Tensor and not has_gain:
            arguments = (node.args[0], vector, *node.args[2:])
        elif user.target is aten.add.Tensor and is_layer_norm and node.args[2] is None:
            arguments = (*node.args[:2], vector, *node.args[3:])
        else:
            return
        with editor.before(user):
            new = editor.call(node.target, *arguments)
        editor.replace(user, new)
        editor.graph.erase_node(node)
        result.rewrites += 1
        node = new
