"""Operators that have no translation of their own, through torch's decompositions of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

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
    translation = translations.get(node.target)
    if translation is None:
        raise UnsupportedError(f"no translation, nor for {node.target}, which is part of it")
    b.node = node
    made = translation(b, *args, **kwargs)
    _remember(b, made, expected)
    return made


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
        with mode, torch.no_grad():
            body = make_fx(call, _decompositions(), tracing_mode="real")(*operands)
    except _UNTRACEABLE as error:
        raise UnsupportedError(
            f"no translation, and torch cannot take it apart: {error}"
        ) from error
    inner = [n for n in body.graph.nodes if n.op == "call_function"]
    if [n.target for n in inner] == [node.target]:
        raise UnsupportedError("no translation")
    return body.graph


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
