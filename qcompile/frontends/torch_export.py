"""From a `torch.nn.Module` to a `Program`, through `torch.export`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final
from unittest import mock

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qcompile.errors import ModelError
from qcompile.ir.program import Program
from qcompile.ir.types import Port, Provenance, Signature
from qcompile.ir.weights import MemorySource, Source, TensorSpec, WeightStore

_MAX_FORMULA: Final = 60
"""Operations in a question about symbolic sizes: a speech encoder of 7 strides asks for 36."""


def capture_module(model: nn.Module, example_inputs: Any) -> Program:
    """Traces any module with example inputs; every batch-like dimension stays dynamic if it can.

    Args:
        model: The module; it is put in evaluation mode for the trace and left as it was.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Returns:
        A program that takes and returns what the module does.

    Raises:
        ModelError: If `torch.export` cannot trace the module.
    """
    args, kwargs = _as_call(example_inputs)
    _require_tensors(args, kwargs)
    exported = _export_dynamic(model, args, kwargs)
    store, rename = _module_weights(model)
    flat_inputs, input_tree = pytree.tree_flatten((args, kwargs))
    graph = unlifted_graph(exported, store, rename)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    assert len(flat_inputs) == len(placeholders)
    output_tree = exported.call_spec.out_spec
    results = list(next(reversed(graph.nodes)).args[0])
    if any(not isinstance(result, fx.Node) for result in results):
        raise ModelError(f"{type(model).__name__} returns a constant beside tensors")
    return Program(
        graph,
        store,
        Signature(
            tuple(Port(node.name) for node in placeholders),
            tuple(Port(f"output_{i}") for i in range(len(results))),
            input_tree,
            output_tree,
        ),
        provenance=Provenance(name=type(model).__name__, architecture=type(model).__name__),
    )


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    name: str,
) -> torch.export.ExportedProgram:
    """`torch.export` in evaluation mode without gradients, with its errors made ours.

    Raises:
        ModelError: With the first line of what `torch.export` said.
    """
    try:
        with evaluation_mode(model), without_caches(model), _short_formulas(), torch.no_grad():
            exported = torch.export.export(
                model, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False
            )
            return exported.run_decompositions({}) if _writes_in_place(exported) else exported
    except QUIETABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"torch.export cannot trace {name}: {reason}",
            remedy="see https://docs.pytorch.org/docs/stable/export.html for what can be traced",
        ) from error


QUIETABLE = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError)
"""What `torch.export` raises for models it cannot trace."""


def _writes_in_place(exported: torch.export.ExportedProgram) -> bool:
    """Whether the trace needs to be made functional (which costs a second trace)."""
    return any(
        isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
        and node.target is not torch.ops.aten.detach_.default
        for module in exported.graph_module.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    )


def unlifted_graph(
    exported: torch.export.ExportedProgram,
    store: WeightStore,
    rename: Callable[[str], str],
) -> fx.Graph:
    """The graph of an exported program with weights as `get_attr` nodes named as in `store`.

    Constants that the trace lifted are put into the store. The bodies of gradient and autocast
    wrappers are inlined, since they mean nothing to a compiler.

    Args:
        exported: What `torch.export` gave.
        store: Has the weights; lifted constants are added.
        rename: From the module's qualified names to those of the store.
    """
    module = exported.module(check_guards=False)
    graph = fx.Graph()
    mapping: dict[fx.Node, Any] = {}
    fake_mode = _fake_mode(module.graph)
    _inline(module, module.graph, graph, mapping, store, rename, fake_mode)
    output = next(node for node in module.graph.nodes if node.op == "output")
    results = fx.node.map_arg(output.args[0], lambda node: mapping[node])
    flat, _ = pytree.tree_flatten(results)
    graph.output(tuple(flat))
    _move_to_meta(graph, fake_mode)
    return graph


def _move_to_meta(graph: fx.Graph, fake_mode: Any) -> None:
    """A program has no device: all its fake values are on the meta device."""
    for node in graph.nodes:
        with fake_mode:
            node.meta["val"] = pytree.tree_map_only(
                Tensor,
                lambda value: value if value.is_meta else torch.empty_like(value, device="meta"),
                node.meta.get("val"),
            )


def _inline(
    module: nn.Module,
    source: fx.Graph,
    graph: fx.Graph,
    mapping: dict[fx.Node, Any],
    store: WeightStore,
    rename: Callable[[str], str],
    fake_mode: Any,
) -> None:
    """Copies the nodes of `source` to the end of `graph`, descending into wrapped regions."""
    for node in source.nodes:
        if node.op == "output" or node in mapping:
            continue
        if node.op == "get_attr":
            value = _attribute(module, str(node.target))
            if isinstance(value, nn.Module):
                mapping[node] = value
            else:
                mapping[node] = _weight_node(
                    graph, store, rename, str(node.target), value, fake_mode
                )
        elif node.op == "call_function" and _is_wrapper(node.target):
            mapping[node] = _inline_wrapper(node, graph, mapping, store, rename, fake_mode)
        elif node.op == "call_function" and _reads_wrapper(node, mapping):
            mapping[node] = mapping[node.args[0]][node.args[1]]
        elif node.op == "call_module":
            continue  # the guards' module, which checks and computes nothing
        elif node.target is torch.ops.aten.detach_.default:
            mapping[node] = mapping[node.args[0]]  # what lifted constants come wrapped in
        else:
            copied = graph.node_copy(node, lambda operand: mapping[operand])
            mapping[node] = copied


def _inline_wrapper(
    node: fx.Node,
    graph: fx.Graph,
    mapping: dict[fx.Node, Any],
    store: WeightStore,
    rename: Callable[[str], str],
    fake_mode: Any,
) -> list[Any]:
    position = next(
        i
        for i, argument in enumerate(node.args)
        if isinstance(argument, fx.Node) and isinstance(mapping.get(argument), fx.GraphModule)
    )
    arguments: tuple[Any, ...] = node.args
    body = mapping[arguments[position]]
    operands = arguments[position + 1 :]
    inner: dict[fx.Node, Any] = {}
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    for placeholder, operand in zip(placeholders, operands, strict=True):
        inner[placeholder] = mapping[operand]
    _inline(body, body.graph, graph, inner, store, rename, fake_mode)
    output = next(n for n in body.graph.nodes if n.op == "output")
    flat, _ = pytree.tree_flatten(output.args[0])
    return [inner[result] if isinstance(result, fx.Node) else result for result in flat]


def _is_wrapper(target: Any) -> bool:
    name = getattr(target, "name", None)
    label = name() if callable(name) else str(name)
    return isinstance(target, torch._ops.HigherOrderOperator) and label in (
        "wrap_with_set_grad_enabled",
        "wrap_with_autocast",
    )


def _reads_wrapper(node: fx.Node, mapping: Mapping[fx.Node, Any]) -> bool:
    first = node.args[0] if node.args else None
    return isinstance(first, fx.Node) and isinstance(mapping.get(first), list)


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _weight_node(
    graph: fx.Graph,
    store: WeightStore,
    rename: Callable[[str], str],
    target: str,
    value: Tensor,
    fake_mode: Any,
) -> fx.Node:
    name = rename(target)
    if name not in store:
        if value.device.type == "meta" and value.numel() > 0:
            raise ModelError(
                f"'{name}' is neither in the checkpoint nor computed by the model's constructor",
                remedy="check that config and checkpoint belong together",
            )
        store.put(name, torch.empty(value.shape, dtype=value.dtype) if value.is_meta else value)
    spec = store.spec(name)
    node = graph.get_attr(name)
    with fake_mode:
        node.meta["val"] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    return node


def _fake_mode(graph: fx.Graph) -> Any:
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    raise ModelError("the model has no tensor inputs")


def _module_weights(model: nn.Module) -> tuple[WeightStore, Callable[[str], str]]:
    """A store over a live module's tensors, and the names of shared ones made one."""
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    first_name: dict[int, str] = {}
    canonical = {name: first_name.setdefault(id(t), name) for name, t in tensors.items()}
    source = MemorySource({name: tensors[name] for name in first_name.values()})
    store = WeightStore()
    for name, spec in source.specs().items():
        dtype = torch.float32 if spec.dtype.is_floating_point else spec.dtype
        store.define(name, Source(source, name), TensorSpec(spec.shape, dtype))
    return store, lambda name: canonical.get(name, name)


def _as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    raise ModelError(
        f"example_inputs is a {type(example_inputs).__name__}",
        remedy="pass a tensor, a tuple of tensors, or a dict of tensors",
    )


def _export_dynamic(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> torch.export.ExportedProgram:
    """Exports with every dimension as dynamic as the module lets it be.

    Each attempt asks for less: all dimensions, then only the first, then none; an example of one
    item is doubled before that, because a dimension of size 1 is taken for a constant.
    """
    failures: list[ModelError] = []
    for inputs in _examples(args, kwargs):
        for dynamic in (None, 1, 0):
            exported = _export_with(model, *inputs, dynamic, failures)
            if exported is not None:
                return exported
    raise failures[0]


def _require_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for path, value in pytree.tree_leaves_with_path((args, dict(kwargs))):
        if not isinstance(value, Tensor):
            raise ModelError(
                f"example input '{pytree.keystr(path[1:])}' is a {type(value).__name__}, not a "
                "tensor",
                remedy="fix it in a module that wraps yours, or pass it as a tensor",
            )


def _examples(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """The example with a batch of two if it is a batch of one throughout; then the example."""
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if tensors and all(value.dim() and value.shape[0] == 1 for value in tensors):
        yield pytree.tree_map_only(
            Tensor, lambda x: x.repeat(2, *[1] * (x.dim() - 1)), (args, kwargs)
        )
    yield args, kwargs


def _export_with(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: int | None,
    failures: list[ModelError],
) -> torch.export.ExportedProgram | None:
    """Exports with the first `dynamic` dimensions of each input symbolic, or all of them."""
    shapes = torch.export.ShapesCollection()
    for tensor in pytree.tree_leaves((args, dict(kwargs))):
        shapes[tensor] = dict.fromkeys(range(tensor.dim())[:dynamic], torch.export.Dim.AUTO)
    try:
        return export(model, args, kwargs, shapes, type(model).__name__)
    except ModelError as error:
        failures.append(error)
        return None


class _LongFormulaError(RuntimeError):
    """A size is too complicated a function of the sizes of inputs."""


@contextlib.contextmanager
def _short_formulas() -> Iterator[None]:
    """Ends a trace in which a question about sizes is longer than can be reasoned about.

    Windows that are padded, shifted and merged again, layer after layer, nest divisions so deeply
    that each question takes minutes; with fewer symbolic sizes the same model is traced at once.
    """
    evaluate = ShapeEnv.evaluate_expr

    def bounded(self: ShapeEnv, question: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(question, sympy.Basic) and int(sympy.count_ops(question)) > _MAX_FORMULA:
            raise _LongFormulaError("its sizes depend on those of inputs in too complicated a way")
        return evaluate(self, question, *args, **kwargs)

    with mock.patch.object(ShapeEnv, "evaluate_expr", bounded):
        yield


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Models that can return a cache of keys and values beside their results do not, inside."""
    configs = {id(found): found for m in model.modules() if (found := getattr(m, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each submodule's own mode restored after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
