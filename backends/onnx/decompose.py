"""Operators that have no translation of their own, through torch's decompositions of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Emitted, Translation
from qcompile.backends.onnx.values import SymbolicScalar, UnsupportedError

_UNTRACEABLE = (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, KeyError)
"""What tracing a decomposition raises where it cannot be traced."""


def decompose(
    b: Builder, translations: Mapping[Any, Translation], *args: Any, **kwargs: Any
) -> Emitted:
    """Emits the present call as the calls that torch itself would make of it.

    Args:
        b: Its `node` is the call.
        translations: Call targets to translations.
        *args: The call's arguments as translations get them.
        **kwargs: Likewise.

    Raises:
        UnsupportedError: If there is no decomposition, or none into what `translations` has.
    """
    node = b.node
    if not isinstance(node.target, torch._ops.OpOverload):
        raise UnsupportedError("no translation")
    values = _leaves((args, kwargs))
    body = _trace(node)
    inputs = iter(
        [value for value, fake in zip(values, _fakes(node), strict=True) if _is_traced(fake)]
    )
    env: dict[fx.Node, Any] = {}
    result: Emitted = None
    try:
        for inner in body.nodes:
            if inner.op == "placeholder":
                env[inner] = next(inputs)
            elif inner.op == "call_function":
                env[inner] = _emit(b, translations, inner, env)
            elif inner.op == "output":
                result = fx.node.map_arg(inner.args[0], env.__getitem__)
            else:
                raise UnsupportedError("no translation")
    finally:
        b.node = node
    return result


def _emit(
    b: Builder, translations: Mapping[Any, Translation], node: fx.Node, env: dict[fx.Node, Any]
) -> Any:
    expected = node.meta.get("val")
    if isinstance(expected, (bool, int, float)):
        return expected
    arguments: Any = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    args, kwargs = arguments
    if node.target is operator.getitem:
        return args[0][args[1]]
    target, written = _functional(node)
    translation = translations.get(target)
    if translation is None:
        raise UnsupportedError(f"no translation, nor for {node.target}, which is part of it")
    b.node = node
    made = translation(b, *args, **kwargs)
    _remember(b, made, expected)
    if written is not None:
        env[written] = made
    return made


def _functional(node: fx.Node) -> tuple[Any, fx.Node | None]:
    """What a call computes, and the value that it writes the result into, if it does that.

    Later uses of that value mean the result. That holds for a tensor of its own, not for a view
    of another.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return target, None
    written, name = node.args[0], target._schema.name.split("::")[1]
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if not name.endswith("_") or not _is_own(written) or packet is None:
        raise UnsupportedError(
            f"no translation, and {target}, which is part of it, writes in place"
        )
    assert isinstance(written, fx.Node)
    return getattr(packet, target._overloadname), written


def _is_own(value: Any) -> bool:
    """Whether a value is a tensor that its call made, not one that others see too."""
    target = value.target if isinstance(value, fx.Node) else None
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return all(returned.alias_info is None for returned in target._schema.returns)


def _remember(b: Builder, made: Any, expected: Any) -> None:
    if isinstance(made, (list, tuple)):
        for value, fake in zip(made, expected, strict=False):
            _remember(b, value, fake)
    elif isinstance(made, SymbolicScalar):
        if isinstance(expected, torch.SymInt):
            b.know_size(expected, made)
    elif made is not None and isinstance(expected, Tensor):
        b.know(made, expected)


def _trace(node: fx.Node) -> fx.Graph:
    """The graph of a call's decomposition over the fake values of its arguments."""
    leaves, tree = pytree.tree_flatten(_example_arguments(node))
    traced = [i for i, leaf in enumerate(leaves) if _is_traced(leaf)]

    def call(*operands: Any) -> Any:
        filled = list(leaves)
        for i, operand in zip(traced, operands, strict=True):
            filled[i] = operand
        args, kwargs = pytree.tree_unflatten(filled, tree)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    operands = [leaves[i] for i in traced]
    mode = next((leaf.fake_mode for leaf in operands if isinstance(leaf, FakeTensor)), None)
    if mode is None:
        raise UnsupportedError("no translation")
    try:
        with mode, _unchanged(mode.shape_env), torch.no_grad():
            body = make_fx(call, _decompositions(), tracing_mode="real")(*operands)
    except _UNTRACEABLE as error:
        raise UnsupportedError(
            f"no translation, and torch cannot take it apart: {error}"
        ) from error
    inner = [n for n in body.graph.nodes if n.op == "call_function"]
    if [n.target for n in inner] == [node.target]:
        raise UnsupportedError("no translation")
    return body.graph


def _unchanged(shape_env: ShapeEnv | None) -> AbstractContextManager[Any]:
    """Sizes that vary must not be fixed to those of the trace: that raises in here."""
    return nullcontext() if shape_env is None else shape_env.error_on_new_guards()


@functools.cache
def _decompositions() -> Mapping[Any, Callable[..., Any]]:
    return core_aten_decompositions()


def _example_arguments(node: fx.Node) -> Any:
    return fx.node.map_arg((list(node.args), dict(node.kwargs)), lambda n: n.meta["val"])


def _fakes(node: fx.Node) -> list[Any]:
    return _leaves(_example_arguments(node))


def _leaves(arguments: Any) -> list[Any]:
    args, kwargs = arguments
    return pytree.tree_leaves((list(args), dict(kwargs)))


def _is_traced(value: Any) -> bool:
    return isinstance(value, (Tensor, torch.SymInt))
