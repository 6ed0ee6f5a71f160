"""Transforms as nodes: before linears, around a site, and on queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx

from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.weights import Stored, TensorSpec
from qcompile.passes.transform.absorb import transform_weight
from qcompile.passes.transform.bias import bias_of, derive_bias
from qcompile.passes.transform.cache_basis import change_cache_basis
from qcompile.passes.transform.untie_weights import own_weight
from qcompile.passes.transform.values import Transform, decode

aten = torch.ops.aten

_ONLINE = "qcompile.online"
"""In ``node.meta``: the transform is to stay in the program."""


def insert_before(program: Program, linears: Sequence[fx.Node], transform: Transform) -> fx.Node:
    """Leaves a transform in front of linears, whose weights take its inverse.

    ``linear(x, W)``  =>  ``linear(qc.transform(x, T), W T^-T)``

    Args:
        program: Edited in place.
        linears: Calls over stored weights that all read the same x.
        transform: T, of the order of x's channels.

    Returns:
        The node. It counts as online: `FuseTransforms` does not undo it.

    Raises:
        ValueError: The order does not fit, or the linears read different values.
    """
    sources = {linear.args[0] for linear in linears}
    if len(sources) != 1:
        raise ValueError(f"the linears read {len(sources)} values")
    (x,) = sources
    assert isinstance(x, fx.Node)
    if x.meta["val"].shape[-1] != transform.size:
        raise ValueError(f"a transform of order {transform.size} before '{linears[0].name}'")
    weight = linears[0].args[1]
    assert isinstance(weight, fx.Node)
    editor = Editor(program)
    with editor.before(linears[0]):
        node = transform_node(editor, x, transform, str(weight.target))
    mark_online(node)
    for linear in linears:
        absorb_before(program, linear, transform.inverse())
        linear.update_arg(0, node)
    return node


def transform_value(program: Program, value: fx.Node, transform: Transform, stem: str) -> fx.Node:
    """All that reads a value reads the transformed value instead.

    Args:
        program: Edited in place. The function changes, unless the caller sees to the inverse.
        value: ``[..., n]``.
        transform: Of order n.
        stem: What the names of its parameters begin with.

    Returns:
        The node; `FuseTransforms` absorbs it where it can.
    """
    editor = Editor(program)
    readers = list(value.users)
    with editor.before(value.next):
        node = transform_node(editor, value, transform, stem)
    for reader in readers:
        reader.replace_input_with(value, node)
    return node


def insert_after(program: Program, linear: fx.Node, transform: Transform) -> fx.Node:
    """Leaves the inverse of a transform behind a linear, whose weight and bias take the transform.

    ``linear(x, W, b)``  =>  ``qc.transform(linear(x, T^T W, b T), T^-1)``

    Args:
        program: Edited in place.
        linear: A call over a stored weight.
        transform: T, of the order of the linear's outputs.

    Returns:
        The node. It counts as online: `FuseTransforms` does not undo it.

    Raises:
        ValueError: The order does not fit.
    """
    if linear.meta["val"].shape[-1] != transform.size:
        raise ValueError(f"a transform of order {transform.size} behind '{linear.name}'")
    absorb_after(program, linear, transform)
    weight = linear.args[1]
    assert isinstance(weight, fx.Node)
    editor = Editor(program)
    with editor.before(linear.next):
        node = transform_node(editor, linear, transform.inverse(), f"{weight.target}.output")
    mark_online(node)
    linear.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    return node


def rotate_queries_and_keys(program: Program, attention: fx.Node, rotation: Transform) -> None:
    """Leaves a rotation on the queries and keys of an attention, all heads alike.

    ``q k^T = (q R) (k R)^T``. New keys are rotated before they join the cache, so that what is
    cached is rotated, and is rotated once.

    Args:
        program: Edited in place.
        attention: A call of `qc.attention`.
        rotation: Orthogonal, of the order of a head's width.
    """
    editor = Editor(program)
    query, key = attention.args[0], attention.args[1]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    cached = key.target is dialect.kv_append
    reader, place, new = (key, 1, key.args[1]) if cached else (attention, 1, key)
    assert isinstance(new, fx.Node)
    past = key.args[0] if cached else None
    if isinstance(past, fx.Node) and past.op == "placeholder":
        for head in range(int(past.meta["val"].shape[1])):
            change_cache_basis(program, str(past.target), head * rotation.size, rotation)
    for value, user, position in ((query, attention, 0), (new, reader, place)):
        with editor.before(user):
            node = transform_node(editor, value, rotation, attention.name)
        mark_online(node)
        user.update_arg(position, node)


def transform_node(editor: Editor, x: fx.Node, transform: Transform, stem: str) -> fx.Node:
    """A call of `qc.transform` at the editor's place; its numbers go into the weight store.

    Floating parameters are kept in float64 and count as float32, which they are rounded to where
    the program computes in it.

    Args:
        editor: Placed where the node goes.
        x: What is transformed.
        transform: The value.
        stem: Parameters are called ``<stem>.transform<i>``.
    """
    encoded = transform.encode()
    params = [_parameter(editor, value, stem) for value in encoded.params]
    return editor.call(dialect.transform, x, params, encoded.kind, list(encoded.dims))


def read_transform(program: Program, node: fx.Node) -> Transform:
    """The value of a `qc.transform` node."""
    params, kind, dims = cast("tuple[Sequence[fx.Node], str, Sequence[int]]", node.args[1:])
    tensors = [program.weights.materialize(str(p.target), torch.float64) for p in params]
    return decode(kind, tensors, list(dims), int(node.meta["val"].shape[-1]))


def mark_online(node: fx.Node) -> None:
    """Says that a transform is to stay in the program."""
    node.meta[_ONLINE] = True


def is_online(node: fx.Node) -> bool:
    """Whether a transform is to stay in the program."""
    return bool(node.meta.get(_ONLINE))


def absorb_before(program: Program, linear: fx.Node, transform: Transform) -> None:
    """``linear(qc.transform(x, T), W, c)``  =>  ``linear(x, W T^T, c + W b)``, b the shift of T.

    Only weight and bias change; the caller sets the input.
    """
    weight = linear.args[1]
    assert isinstance(weight, fx.Node)
    name, _ = own_weight(program, str(weight.target), linear)
    if not transform.is_linear:
        offset = transform.offset()
        derive_bias(program, linear, (name,), lambda bias, w: bias + w @ offset, "shift")
    transform_weight(program, name, 1, transform.linear_part().transposed())


def absorb_after(program: Program, linear: fx.Node, transform: Transform) -> None:
    """``qc.transform(linear(x, W, c), T)``  =>  ``linear(x, T^T W, c T)``: weight and bias only."""
    weight = linear.args[1]
    assert isinstance(weight, fx.Node)
    name, _ = own_weight(program, str(weight.target), linear)
    transform_weight(program, name, 0, transform.linear_part())
    if bias_of(linear) is not None or not transform.is_linear:
        derive_bias(program, linear, (), transform.apply, "transform")


def _parameter(editor: Editor, value: Tensor, stem: str) -> fx.Node:
    weights = editor.program.weights
    i = 0
    while f"{stem}.transform{i}" in weights:
        i += 1
    name = f"{stem}.transform{i}"
    dtype = torch.float32 if value.dtype.is_floating_point else value.dtype
    weights.define(name, Stored(value.detach()), TensorSpec(tuple(value.shape), dtype))
    return editor.weight(name)
