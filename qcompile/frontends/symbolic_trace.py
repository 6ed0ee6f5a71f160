"""Tracing a model over symbolic sizes that its inputs share.

`torch.export` gives every dimension of every input a symbol of its own and then proves them equal,
which takes most of its time for a model with sixty cache inputs. Here the inputs are made from few
symbols to begin with, and parameters are fake tensors on the CPU: nothing is allocated, and the
constants that a model computes while it is traced keep their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.amp.autocast_mode as autocast
from torch import Tensor, fx, nn
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from qcompile.errors import ModelError
from qcompile.ir.sizes import expression as expression_of
from qcompile.ir.weights import WeightStore

MODES = frozenset({torch._C._set_grad_enabled, autocast._enter_autocast, autocast._exit_autocast})
"""Calls that switch modes of eager execution; they mean nothing to a compiler."""

CONSTANT = "constant_"
"""How the names of tensors begin that a model computes while it is traced."""

_HINTS = (3, 5, 7, 11, 13)
"""Traced sizes: at least 2, since 0 and 1 are special, and all different."""


@dataclass(frozen=True)
class Trace:
    """A traced function.

    Attributes:
        graph: Inputs as placeholders, weights as `get_attr`, ATen and `qc::` calls, and one flat
            tuple of results. Values in ``meta["val"]`` are on the meta device.
        assumptions: What the trace took for granted of the symbolic sizes, as text.
    """

    graph: fx.Graph
    assumptions: tuple[str, ...]


class SymbolicTracer:
    """Traces one function of symbolic sizes.

    Args:
        *names: The sizes: they are 2 or more, and nothing else is assumed of them.

    Attributes:
        mode: The fake tensor mode that owns the sizes.
        sizes: Name to symbolic size.
    """

    def __init__(self, *names: str) -> None:
        self.environment = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.environment, allow_non_fake_inputs=True)
        context: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC] * len(names))
        prototype = self.mode.from_tensor(
            torch.empty(_HINTS[: len(names)], device="meta"), symbolic_context=context
        )
        self.sizes = dict(zip(names, prototype.shape, strict=True))

    def trace(
        self,
        model: nn.Module,
        inputs: Mapping[str, tuple[str, ...]],
        call: Callable[..., Sequence[Tensor]],
        store: WeightStore,
        rename: Callable[[str], str],
    ) -> Trace:
        """Traces ``call(**inputs)``, which runs `model`.

        Args:
            model: Its parameters and buffers become weights of the graph.
            inputs: Name to the sizes of an int64 input; ``"a + b"`` is a sum of sizes.
            call: Gets one tensor per input, by name; returns the results.
            store: Has the weights; constants that the trace met are added.
            rename: From the model's qualified names to those of the store.

        Raises:
            ModelError: If a size was specialized, or a weight has no numbers.
        """
        with self.mode:
            tensors = {
                name: torch.ones([self._size(size) for size in shape], dtype=torch.int64)
                for name, shape in inputs.items()
            }
            weights, places = _fake_weights(model, rename)

        def function(values: list[Tensor], given: list[Tensor]) -> list[Tensor]:
            by_name = dict(zip(weights, values, strict=True))
            tensors_by_place = {name: by_name[stored] for name, stored in places.items()}
            with _unchanged(model), _swapped(model, tensors_by_place):
                return list(call(**dict(zip(tensors, given, strict=True))))

        arguments = (list(weights.values()), list(tensors.values()))
        module = self._run(function, arguments)
        if _mutates(module.graph):
            functional = FunctionalTensorMode(pre_dispatch=True, export=True)
            module = self._run(dispatch_functionalize(function, functional), arguments)
        self._check_sizes()
        graph = self._finish(module, list(weights), list(tensors), store)
        return Trace(graph, self._assumptions())

    def _size(self, text: str) -> Any:
        first, *rest = (self.sizes[name.strip()] for name in text.split("+"))
        return sum(rest, start=first)

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> fx.GraphModule:
        tracer = make_fx(
            function, tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True
        )
        with torch.no_grad(), _compiling_state_context():
            module: fx.GraphModule = tracer(*arguments)
        return module

    def _check_sizes(self) -> None:
        for name, size in self.sizes.items():
            expression = self.environment.replace(expression_of(size))
            if not expression.free_symbols:
                raise ModelError(
                    f"the model works for {name} = {expression} only, as one does that loops over "
                    "its text in Python",
                    remedy="capture it as a module: qcompile.capture(model, example_inputs=...)",
                )

    def _assumptions(self) -> tuple[str, ...]:
        names = {str(expression_of(size)): name for name, size in self.sizes.items()}
        found = []
        for guard in self.environment.guards:
            text = str(guard.expr)
            for symbol, name in names.items():
                text = text.replace(symbol, name)
            found.append(text)
        return tuple(dict.fromkeys(found))

    def _finish(
        self, module: fx.GraphModule, weights: list[str], inputs: list[str], store: WeightStore
    ) -> fx.Graph:
        """The traced graph with weights and inputs told apart, on the meta device."""
        graph = fx.Graph()
        mapping: dict[fx.Node, Any] = {}
        traced = [node for node in module.graph.nodes if node.op == "placeholder"]
        weight_names = dict(zip(traced, weights, strict=False))
        for node, name in zip(traced[len(weights) :], inputs, strict=True):
            mapping[node] = graph.placeholder(name)
            mapping[node].meta["val"] = _on_meta(node.meta["val"])

        def operand(node: fx.Node) -> Any:
            if node not in mapping:
                mapping[node] = self._weight(graph, store, weight_names[node])
            return mapping[node]

        for node in module.graph.nodes:
            if node.op == "get_attr":
                name = _store_constant(store, getattr(module, str(node.target)))
                mapping[node] = self._weight(graph, store, name)
            elif node.target is torch.ops.aten.detach_.default:
                mapping[node] = operand(node.args[0])  # what lifted constants come wrapped in
            elif node.op == "call_function" and _computes(node):
                mapping[node] = graph.node_copy(node, operand)
                mapping[node].meta = {"val": _on_meta(node.meta["val"])}
            elif node.op == "output":
                flat = [operand(n) for n in torch.utils._pytree.tree_leaves(node.args[0])]
                graph.output(tuple(flat))
        return graph

    def _weight(self, graph: fx.Graph, store: WeightStore, name: str) -> fx.Node:
        if name not in store:
            raise ModelError(
                f"'{name}' is neither in the checkpoint nor computed by the model's constructor",
                remedy="check that config and checkpoint belong together",
            )
        spec = store.spec(name)
        node = graph.get_attr(name)
        with self.mode:
            node.meta["val"] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        return node


def _on_meta(value: Any) -> Any:
    """A traced value, its tensors on the meta device: a program has no device."""
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(item, FakeTensor):
            item.fake_device = torch.device("meta")  # what it stores is there in any case
    return value


def _fake_weights(
    model: nn.Module, rename: Callable[[str], str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Fake tensors by name in the store, and that name for each name in the model."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    places = {name: rename(name) for name, _ in named}
    weights: dict[str, Tensor] = {}
    for name, tensor in named:
        if places[name] not in weights:
            weights[places[name]] = torch.empty(tensor.shape, dtype=tensor.dtype)
    return weights, places


@contextmanager
def _swapped(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other tensors as its parameters and buffers."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    for qualified, tensor in tensors.items():
        prefix, _, name = qualified.rpartition(".")
        module = model.get_submodule(prefix)
        is_parameter = name in module._parameters
        place: dict[str, Any] = module._parameters if is_parameter else module._buffers
        kept.append((place, name, place[name]))
        place[name] = tensor
    try:
        yield
    finally:
        for place, name, value in kept:
            place[name] = value


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward leaves in its modules: traced values mean nothing outside."""
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def _mutates(graph: fx.Graph) -> bool:
    return any(
        isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
        and node.target is not torch.ops.aten.detach_.default
        for node in graph.nodes
    )


def _computes(node: fx.Node) -> bool:
    """Whether a call gives a value; assertions do not."""
    return node.target not in MODES and "val" in node.meta


def _store_constant(store: WeightStore, value: Tensor) -> str:
    if isinstance(value, FakeTensor):
        raise ModelError("the model keeps a value from one call to the next outside its buffers")
    index = sum(name.startswith(CONSTANT) for name in store)
    name = f"{CONSTANT}{index}"
    store.put(name, value)
    return name
