"""Inserting nodes whose shapes are right by construction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.ir.program import Program


class Editor:
    """Adds nodes to a program and computes their fake values as it goes.

    Args:
        program: The program to edit.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        self._mode: FakeTensorMode = program.fake_mode

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """New nodes go right before `node`."""
        with self.graph.inserting_before(node):
            yield

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """New nodes go right after `node`."""
        with self.graph.inserting_after(node):
            yield

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator, with the shape that its rule gives."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self.infer(node)
        return node

    def infer(self, node: fx.Node) -> Any:
        """The fake value of a call, computed from those of its arguments."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        # Some shape rules (pads by symbolic sizes) only the dispatcher in Python has.
        with enable_python_dispatcher(), self._mode, torch.device("meta"), torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def weight(self, name: str) -> fx.Node:
        """A reference to an entry of the weight store."""
        spec = self.program.weights.spec(name)
        node = self.graph.get_attr(name)
        with self._mode:
            node.meta["val"] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """All uses of `old` become uses of `new`; `old` is erased."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
