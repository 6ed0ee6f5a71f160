"""What a stream computes in one go, and what names it: the parts of a program on its way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.calibration.attention import attention
from qcompile.errors import DataError
from qcompile.ir import dialect
from qcompile.ir.text import format_target

_FASTER: Mapping[Any, Callable[..., Any]] = {dialect.attention: attention}
"""What is computed in place of references that are slow on long inputs."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a program, for those who compute it themselves.

    Attributes:
        nodes: What is to be computed, in order.
        reads: Values from before that it needs; they are in the stream.
        constants: Values that it needs and that depend on weights alone.
    """

    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    constants: Mapping[fx.Node, Any]


def compute_node(node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    """The value of a call, with what is fast on long inputs in place of slow references.

    Args:
        node: The call.
        env: Values of its operands.

    Raises:
        DataError: It cannot be called on these values.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    try:
        return _FASTER.get(node.target, node.target)(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"node '{node.name}' ({format_target(node.target)}) cannot run on the calibration "
            f"data: {reason[0]}",
            remedy="check that the data belongs to the model: its tokenizer, its input shapes",
        ) from error


@dataclass(frozen=True)
class Part:
    """A part of a program that runs at once.

    Attributes:
        nodes: What is computed, in order.
        reads: Values from before that it needs.
        keeps: Values of it that are needed later.
        drops: Values from before that nobody needs any more.
        releases: After which node which values are not needed within the part any more.
    """

    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    keeps: tuple[fx.Node, ...]
    drops: tuple[fx.Node, ...]
    releases: Mapping[fx.Node, Sequence[fx.Node]]

    def text(self) -> str:
        """The nodes as text: equal for parts that compute the same of the same."""
        return "\n".join(
            f"{node.name} = {format_target(node.target)}{node.args}{node.kwargs}"
            for node in self.nodes
        )


@dataclass(frozen=True, eq=False)
class Prepared:
    """A part that is ready to run, or to be skipped.

    Attributes:
        asked: What it was to lead to, and which targets nobody will ask for after that.
        part: What runs.
        constants: What that reads that depends on weights alone.
        key: A hash of all that decides about its values.
    """

    asked: tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]
    part: Part
    constants: Mapping[fx.Node, Any]
    key: str


def digest(*parts: str) -> str:
    """A hash of some texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def digest_value(value: Any) -> str:
    """A hash of a tensor; other values as text."""
    return digest_tensor(value) if isinstance(value, Tensor) else repr(value)


def digest_tensor(tensor: Tensor) -> str:
    """A hash of a tensor's shape, dtype and contents."""
    hashed = hashlib.sha256(f"{tuple(tensor.shape)}:{tensor.dtype}".encode())
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    hashed.update(content.numpy().data)
    return hashed.hexdigest()
