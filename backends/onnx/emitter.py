"""From a program to an ONNX model whose weights are still in the program's store."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompile.backends.onnx.aten import ATEN
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.calls import Call
from qcompile.backends.onnx.decompose import decompose
from qcompile.backends.onnx.dialect import DIALECT
from qcompile.backends.onnx.dialect_cache import CACHE
from qcompile.backends.onnx.dialect_experts import EXPERTS
from qcompile.backends.onnx.dialect_float import FLOATS
from qcompile.backends.onnx.dialect_lookup import LOOKUP
from qcompile.backends.onnx.dialect_recurrence import RECURRENCE
from qcompile.backends.onnx.dialect_sparse import SPARSE
from qcompile.backends.onnx.ports import DimensionNames
from qcompile.backends.onnx.sizes import PYTHON
from qcompile.backends.onnx.translation import Emitted, Translation
from qcompile.backends.onnx.values import (
    SymbolicScalar,
    UnsupportedError,
    WeightTensor,
    to_ir_dtype,
)
from qcompile.errors import TargetError
from qcompile.ir.program import Program
from qcompile.ir.text import format_target
from qcompile.ir.weights import Source, WeightStore

DEFAULT_OPSET = 21
"""Oldest version that has all that the translations use: in ONNX 1.16, ONNX Runtime 1.18."""

NEWEST_OPSET = 26
"""Newest version that a release of ONNX Runtime reads (1.31)."""

_IR_VERSION = 10  # of ONNX 1.16
_CUSTOM_OPSET = 1
_LISTED = 5

STANDARD: Mapping[Any, Translation] = MappingProxyType(
    {**PYTHON, **ATEN, **DIALECT, **CACHE, **EXPERTS, **LOOKUP, **FLOATS, **SPARSE, **RECURRENCE}
)
"""Every call target that the standard operators can express."""


@dataclass(frozen=True, eq=False)
class OnnxGraph:
    """A model without the numbers of its weights.

    Attributes:
        model: The graph; initializers that are weights have no value yet.
        weights: Name of an initializer to the weight that it is.
    """

    model: ir.Model
    weights: Mapping[str, WeightTensor]


@dataclass(frozen=True)
class Untranslatable:
    """A call that cannot be emitted.

    Attributes:
        node: Its name in the program.
        operator: What it calls.
        module: Path of the module that it comes from; empty where the trace did not say.
        reason: Why not, one clause.
    """

    node: str
    operator: str
    module: str
    reason: str

    def __str__(self) -> str:
        place = f" in '{self.module}'" if self.module else ""
        return f"'{self.node}' ({self.operator}){place}: {self.reason}"


class OnnxEmitter:
    """Writes programs as ONNX graphs, one translation per call, without reading a weight.

    Args:
        translations: Call targets that the target knows better than the standard operators do,
            or beyond them; they win over `STANDARD`.
        opset: Version of the standard operators, from `DEFAULT_OPSET` to `NEWEST_OPSET`.

    Raises:
        TargetError: If it is another one.
    """

    def __init__(
        self,
        translations: Mapping[Any, Translation] = MappingProxyType({}),
        *,
        opset: int = DEFAULT_OPSET,
    ) -> None:
        if opset < DEFAULT_OPSET:
            raise TargetError(
                f"opset {opset} lacks operators that programs need",
                remedy=f"use {DEFAULT_OPSET} to {NEWEST_OPSET}",
            )
        if opset > NEWEST_OPSET:
            raise TargetError(
                f"opset {opset} is one that no run time reads yet",
                remedy=f"use {DEFAULT_OPSET} to {NEWEST_OPSET}",
            )
        self._translations = {**STANDARD, **translations}
        self._opset = opset

    def emit(self, program: Program, *, name: str = "model") -> OnnxGraph:
        """The program as a model; its inputs and outputs are named as in the signature.

        Raises:
            TargetError: Names all calls that cannot be emitted.
        """
        emission = self._run(program)
        if emission.failures:
            raise _cannot_emit(emission.failures)
        return emission.graph(name)

    def untranslatable(self, program: Program) -> list[Untranslatable]:
        """The calls that `emit` would refuse, without making a model."""
        return self._run(program).failures

    def _run(self, program: Program) -> _Emission:
        emission = _Emission(program, self._translations, self._opset)
        for node in program.graph.nodes:
            emission.visit(node)
        return emission


class _Emission:
    """One walk over a program."""

    def __init__(
        self, program: Program, translations: Mapping[Any, Translation], opset: int
    ) -> None:
        self.program = program
        self.failures: list[Untranslatable] = []
        self._translations = translations
        self._weights = _Weights(program)
        self._env: dict[fx.Node, Any] = {}
        self._builder = Builder(
            opset,
            weight=self._weights.tensor,
            transposable=self._weights.transposable,
            emitted=self._env,
        )
        self._dimensions = DimensionNames(program)
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        # The names of outputs are a contract, so they are taken before any other.
        self._output_names = [self._builder.unique(port.name) for port in program.signature.outputs]
        self._ports = {
            node: port.name
            for node, port in zip(program.inputs, program.signature.inputs, strict=True)
        }

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            value = self._builder.input(self._ports[node], node.meta["val"])
            self._describe(value, node.meta["val"])
            self._inputs.append(value)
            self._env[node] = value
        elif node.op == "get_attr":
            value = self._builder.weight(str(node.target))
            self._builder.know(value, node.meta["val"])
            self._env[node] = value
        elif node.op == "call_function":
            self._env[node] = self._call(node)
        else:
            self._finish(node)

    def _call(self, node: fx.Node) -> Any:
        expected = node.meta.get("val")
        if isinstance(expected, (bool, int, float)):
            return expected
        self._builder.node = node
        before = len(self._builder.calls)
        try:
            emitted = self._translate(node)
            self._keep(node, emitted, self._builder.calls[before:])
        except UnsupportedError as error:
            self.failures.append(_failure(node, str(error)))
            return self._stand_in(expected)
        return emitted

    def _translate(self, node: fx.Node) -> Emitted:
        arguments: Any = fx.node.map_arg((node.args, node.kwargs), self._env.__getitem__)
        args, kwargs = arguments
        if node.target is operator.getitem:
            element: Emitted = args[0][args[1]]
            return element
        translation = self._translations.get(node.target)
        if translation is not None:
            return translation(self._builder, *args, **kwargs)
        return decompose(self._builder, self._translations, *args, **kwargs)

    def _keep(self, node: fx.Node, emitted: Emitted, made: Sequence[Call]) -> None:
        """Gives what a translation made the program's names and shapes."""
        expected = node.meta.get("val")
        if isinstance(emitted, SymbolicScalar):
            if isinstance(expected, torch.SymInt):
                self._builder.know_size(expected, emitted)
            emitted, expected = emitted.value, None
        if isinstance(emitted, ir.Value):
            self._name(emitted, expected, node.name)
        elif isinstance(emitted, Sequence):
            # Outputs that nothing reads may be missing at the end.
            for i, (value, fake) in enumerate(zip(emitted, expected or (), strict=False)):
                self._name(value, fake, f"{node.name}.{i}")
        for call in made:
            for value in call.outputs:
                if value.name is None:
                    value.name = self._builder.unique(f"{node.name}.{call.op_type.lower()}")

    def _name(self, value: ir.Value, fake: Any, name: str) -> None:
        if value.name is None:
            value.name = self._builder.unique(name)
            if isinstance(fake, Tensor):
                self._describe(value, fake)
        if isinstance(fake, Tensor):
            self._builder.know(value, fake)

    def _describe(self, value: ir.Value, fake: Tensor) -> None:
        value.shape = self._dimensions.shape(fake)

    def _stand_in(self, expected: Any) -> Any:
        """Something for the calls that follow one that failed, so that all failures are found."""
        if isinstance(expected, (list, tuple)):
            return [self._stand_in(item) for item in expected]
        value = ir.Value()
        value.dtype = ir.DataType.INT64
        if not isinstance(expected, Tensor):
            return SymbolicScalar(value)
        value.dtype = to_ir_dtype(expected.dtype)
        self._builder.know(value, expected)
        return value

    def _finish(self, node: fx.Node) -> None:
        taken: set[ir.Value] = set(self._inputs)
        for name, result in zip(self._output_names, node.args[0], strict=True):  # type: ignore[arg-type]
            value, fake = self._env[result], result.meta["val"]
            if value in taken or str(value.name) in self._builder.initializers:
                value = self._builder.op("Identity", value)
            taken.add(value)
            value.name = name
            self._describe(value, fake)
            self._outputs.append(value)

    def graph(self, name: str) -> OnnxGraph:
        """The model of all that was emitted, without what nothing uses."""
        builder = self._builder
        calls = _live(builder.calls, self._outputs)
        used = {value for call in calls for value in call.inputs}
        initializers = [value for value in builder.initializers.values() if value in used]
        domains = {call.domain for call in calls} - {""}
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=[_node(call) for call in calls],
            initializers=initializers,
            opset_imports={"": builder.opset, **dict.fromkeys(sorted(domains), _CUSTOM_OPSET)},
            name=name,
        )
        model = ir.Model(graph, ir_version=_IR_VERSION, producer_name="qcompile")
        names = {str(value.name) for value in initializers}
        weights = {key: weight for key, weight in builder.weights.items() if key in names}
        return OnnxGraph(model, MappingProxyType(weights))


class _Weights:
    """The weights of a program: tied ones made one, and whether linears alone use them."""

    def __init__(self, program: Program) -> None:
        self._store = program.weights
        self._first: dict[Any, str] = {}
        self._used_otherwise: set[str] = set()
        for node in program.parameters():
            name = str(node.target)
            key = (_identity(self._store, name), self._store.spec(name))
            first = self._first.setdefault(key, name)
            if not all(_is_linear_weight(user, node) for user in node.users):
                self._used_otherwise.add(first)

    def tensor(self, name: str) -> WeightTensor:
        """The weight, under the first of its names."""
        spec = self._store.spec(name)
        first = self._first.get((_identity(self._store, name), spec), name)
        return WeightTensor(first, spec)

    def transposable(self, name: str) -> bool:
        return name not in self._used_otherwise and len(self._store.spec(name).shape) == 2


def _identity(store: WeightStore, name: str) -> Any:
    """Equal for names of the same numbers."""
    made = store.expression(name)
    return (id(made.checkpoint), made.name) if isinstance(made, Source) else id(made)


def _is_linear_weight(user: fx.Node, weight: fx.Node) -> bool:
    others = [*user.args[:1], *user.args[2:], *user.kwargs.values()]
    return user.target is torch.ops.aten.linear.default and weight not in others


def _live(calls: Sequence[Call], outputs: Sequence[ir.Value]) -> list[Call]:
    """The calls that outputs depend on, in order."""
    needed: set[ir.Value | None] = set(outputs)
    kept = []
    for call in reversed(calls):
        if not needed.isdisjoint(call.outputs):
            needed.update(call.inputs)
            kept.append(call)
    return kept[::-1]


def _node(call: Call) -> ir.Node:
    return ir.Node(
        call.domain,
        call.op_type,
        call.inputs,
        call.attributes,
        outputs=call.outputs,
        name=f"{call.outputs[0].name}:{call.op_type}",
    )


def _failure(node: fx.Node, reason: str) -> Untranslatable:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return Untranslatable(node.name, format_target(node.target), str(path), reason)


def _cannot_emit(failures: Sequence[Untranslatable]) -> TargetError:
    listed = "; ".join(str(failure) for failure in failures[:_LISTED])
    rest = len(failures) - _LISTED
    more = f"; and {rest} more" if rest > 0 else ""
    return TargetError(
        f"{len(failures)} operator(s) have no ONNX form: {listed}{more}",
        remedy="pass a translation for them, or replace them in the model",
    )
