"""Running what was emitted, and comparing it with torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from qcompile.backends.onnx.emitter import OnnxEmitter, OnnxGraph
from qcompile.backends.onnx.external_data import to_bytes
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.program import Program
from qcompile.passes.canonicalize import canonicalize

Inputs = tuple[Tensor, ...]

Table = dict[str, tuple[Callable[..., Any], Callable[[int], Inputs]]]
"""Name of a case to the function and to its inputs, given the size of the dynamic axis."""


class _Unary(nn.Module):
    """`capture_module` wants a signature of fixed length."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor) -> Any:
        return self.function(a)


class _Binary(_Unary):
    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.function(a, b)


class _Ternary(_Unary):
    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Any:
        return self.function(a, b, c)


class _Quaternary(_Unary):
    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Any:
        return self.function(a, b, c, d)


_MODULES = (_Unary, _Binary, _Ternary, _Quaternary)


class Harness:
    """Captures, emits, runs in ONNX Runtime, compares."""

    def __init__(self) -> None:
        self._groups: dict[Any, tuple[list[int], list[tuple[list[Any], list[Tensor]]]]] = {}

    def module(self, function: Callable[..., Any], inputs: Inputs) -> nn.Module:
        if isinstance(function, nn.Module):
            return function.eval()
        return _MODULES[len(inputs) - 1](function)

    def capture(self, function: Callable[..., Any], *inputs: Tensor) -> Program:
        return canonicalize(capture_module(self.module(function, inputs), inputs))

    def emit(self, program: Program, **options: Any) -> OnnxGraph:
        return OnnxEmitter(**options).emit(program)

    def session(self, program: Program, **options: Any) -> onnxruntime.InferenceSession:
        graph = self.emit(program, **options)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 3
        return onnxruntime.InferenceSession(
            to_bytes(graph, program.weights), settings, providers=["CPUExecutionProvider"]
        )

    def run(self, session: onnxruntime.InferenceSession, *inputs: Tensor) -> list[Any]:
        names = [value.name for value in session.get_inputs()]
        feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return list(session.run(None, feeds))

    def check(
        self,
        function: Callable[..., Any],
        inputs: Callable[[int], Inputs],
        *,
        sizes: Sequence[int] = (4, 7),
        rtol: float = 1e-5,
        atol: float = 2e-6,
        canonical: bool = True,
    ) -> None:
        """Captured with the first size, the function gives what torch gives with each size.

        The tolerances are some float32 roundings of values around 1: sums come in other orders.
        """
        for found, expected in self.compare(function, inputs, sizes, canonical):
            assert_equal(found, expected, rtol, atol)

    def compare(
        self,
        function: Callable[..., Any],
        inputs: Callable[[int], Inputs],
        sizes: Sequence[int] = (4, 7),
        canonical: bool = True,
    ) -> list[tuple[list[Any], list[Tensor]]]:
        """For each size, what ONNX Runtime gives and what torch gives."""
        torch.manual_seed(0)
        example = inputs(sizes[0])
        module = self.module(function, example)
        program = capture_module(module, example)
        session = self.session(canonicalize(program) if canonical else program)
        compared = []
        for size in sizes:
            values = inputs(size)
            with torch.no_grad():
                expected = module(*values)
            expected = [expected] if isinstance(expected, Tensor) else list(expected)
            compared.append((self.run(session, *values), expected))
        return compared

    def check_case(self, table: Table, name: str, **tolerances: float) -> None:
        """One function of a table equals torch.

        Functions of the same inputs share one program, because tracing takes most of the time.
        """
        inputs = table[name][1]
        names = [other for other, case in table.items() if case[1] is inputs]
        key = (id(table), inputs)
        if key not in self._groups:
            functions = [table[other][0] for other in names]

            def together(*values: Tensor) -> list[Tensor]:
                return [result for function in functions for result in _flat(function(*values))]

            torch.manual_seed(0)
            counts = [len(_flat(function(*inputs(4)))) for function in functions]
            self._groups[key] = (counts, self.compare(together, inputs))
        counts, compared = self._groups[key]
        start = sum(counts[: names.index(name)])
        part = slice(start, start + counts[names.index(name)])
        for found, expected in compared:
            assert_equal(found[part], expected[part], **tolerances)


def assert_equal(
    found: Sequence[Any], expected: Sequence[Tensor], rtol: float = 1e-5, atol: float = 2e-6
) -> None:
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        wanted = theirs.detach().numpy()
        assert ours.dtype == wanted.dtype
        assert ours.shape == wanted.shape
        np.testing.assert_allclose(ours, wanted, rtol=rtol, atol=atol)


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.fixture(scope="session")
def onnx() -> Harness:
    torch.set_num_threads(1)
    return Harness()
