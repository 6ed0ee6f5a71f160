"""The nodes of a program as JSON values, and back.

| node | JSON |
|---|---|
| placeholder | ``{"op": "input", "name": "input_ids", "value": VALUE}`` |
| get_attr | ``{"op": "weight", "weight": "model.norm.weight"}`` |
| call_function | ``{"op": "call", "name": "linear", "target": "aten.linear.default",`` |
| | ``"args": [ARGUMENT, ...], "kwargs": {...}, "value": VALUE}`` |

An ARGUMENT is null, a boolean, number, string or list, or an object with one key that says what it
is: ``{"node": 3}`` (the result of the fourth node), ``{"dtype": "float32"}``, ``{"tuple": [...]}``,
``{"float": "inf"}``, ``{"device": "cpu"}``, ``{"layout": "strided"}``,
``{"memory_format": "contiguous_format"}``. A VALUE is what is known of a result: null,
``{"tensor": [dtype, shape, strides]}``, ``{"scalar": size, number or condition}``,
``{"list": [...]}`` or ``{"tuple": [...]}``; sizes are those of `qcompile.ir.size_text`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from torch import Tensor, fx

from qcompile.errors import ArtifactError, TargetError
from qcompile.ir.operators import find_operator, operator_name
from qcompile.ir.size_text import SizeReader, SizeWriter
from qcompile.ir.weights import WeightStore

_MAX_SIZE = 1 << 48
_MAX_RANK = 64

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128),
    )
}
"""The dtypes that a saved program may name."""

_NAMED: Mapping[str, Mapping[str, Any]] = {
    "dtype": DTYPES,
    "device": {"cpu": torch.device("cpu"), "meta": torch.device("meta")},
    "layout": {"strided": torch.strided},
    "memory_format": {
        "contiguous_format": torch.contiguous_format,
        "preserve_format": torch.preserve_format,
        "channels_last": torch.channels_last,
        "channels_last_3d": torch.channels_last_3d,
    },
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
}


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InputNode(_Node):
    """A placeholder."""

    op: Literal["input"]
    name: str = Field(min_length=1)
    value: JsonValue


class WeightNode(_Node):
    """A reference to a weight."""

    op: Literal["weight"]
    weight: str


class CallNode(_Node):
    """A call."""

    op: Literal["call"]
    name: str = Field(min_length=1)
    target: str
    args: list[JsonValue]
    kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    value: JsonValue


JsonNode = Annotated[InputNode | WeightNode | CallNode, Field(discriminator="op")]


class GraphWriter:
    """Writes the nodes of a graph.

    Args:
        graph: The graph.

    Attributes:
        sizes: The symbols that its values name.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.sizes = SizeWriter(node.meta.get("val") for node in graph.nodes)
        self._index: dict[fx.Node, int] = {}

    def write(self, node: fx.Node) -> dict[str, Any]:
        """One node, after those that it reads.

        Raises:
            TargetError: If it holds something that has no JSON form.
        """
        try:
            written = self._node(node)
        except ValueError as error:
            raise TargetError(f"node '{node.name}' cannot be saved: {error}") from error
        self._index[node] = len(self._index)
        return written

    def reference(self, node: fx.Node) -> int:
        """The place of a node that has been written."""
        return self._index[node]

    def _node(self, node: fx.Node) -> dict[str, Any]:
        match node.op:
            case "placeholder":
                return {"op": "input", "name": node.name, "value": self._value(node.meta["val"])}
            case "get_attr":
                return {"op": "weight", "weight": str(node.target)}
        target = operator_name(node.target)
        if target is None:
            raise ValueError(f"saved programs may not call {node.target}")
        written: dict[str, Any] = {"op": "call", "name": node.name, "target": target}
        written["args"] = [self._argument(argument) for argument in node.args]
        if node.kwargs:
            written["kwargs"] = {key: self._argument(v) for key, v in node.kwargs.items()}
        return {**written, "value": self._value(node.meta["val"])}

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return {"node": self._index[value]}
        if isinstance(value, tuple):
            return {"tuple": [self._argument(item) for item in value]}
        if isinstance(value, list):
            return [self._argument(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": "nan" if math.isnan(value) else str(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        for kind in ("dtype", "device", "layout", "memory_format"):
            for name, known in _NAMED[kind].items():
                if type(value) is type(known) and value == known:
                    return {kind: name}
        raise ValueError(f"its argument {value!r} has no text form")

    def _value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            shape, strides = (list(map(self.sizes.write, s)) for s in (value.shape, value.stride()))
            return {"tensor": [str(value.dtype).removeprefix("torch."), shape, strides]}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self._value(item) for item in value]}
        return None if value is None else {"scalar": self.sizes.write(value)}


class GraphReader:
    """Builds a graph from nodes, one after the other.

    Args:
        hints: The symbols, as `SizeWriter.hints`.
        weights: What weight nodes may name.

    Raises:
        ArtifactError: If a symbol is no size.

    Attributes:
        graph: The graph so far.
    """

    def __init__(self, hints: Mapping[str, int | None], weights: WeightStore) -> None:
        try:
            self._sizes = SizeReader(hints)
        except ValueError as error:
            raise ArtifactError(f"the program is damaged: {error}") from error
        self._weights = weights
        self._nodes: list[fx.Node] = []
        self._tensors: dict[str, Tensor] = {}
        self.graph = fx.Graph()

    def read(self, written: InputNode | WeightNode | CallNode) -> None:
        """Adds a node.

        Raises:
            ArtifactError: Names the node that is not valid.
        """
        try:
            node = self._node(written)
        except ValueError as error:
            place = f"node {len(self._nodes)} ({written.op})"
            raise ArtifactError(
                f"the program is damaged: {place}: {error}",
                remedy="copy or compile the artifact again",
            ) from error
        self._nodes.append(node)

    def finish(self, results: Sequence[int]) -> fx.Graph:
        """Ends the graph with its results.

        Raises:
            ArtifactError: If a result is no node.
        """
        if not all(0 <= index < len(self._nodes) for index in results):
            raise ArtifactError("the program is damaged: a result is none of its nodes")
        self.graph.output(tuple(self._nodes[index] for index in results))
        return self.graph

    def _node(self, written: InputNode | WeightNode | CallNode) -> fx.Node:
        if isinstance(written, InputNode):
            node = self.graph.placeholder(written.name)
            node.meta["val"] = self._value(written.value)
        elif isinstance(written, WeightNode):
            if written.weight not in self._weights:
                raise ValueError(f"there is no weight '{written.weight}'")
            spec = self._weights.spec(written.weight)
            node = self.graph.get_attr(written.weight)
            with self._sizes.mode:
                node.meta["val"] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        else:
            args = tuple(map(self._argument, written.args))
            kwargs = {key: self._argument(value) for key, value in written.kwargs.items()}
            target = find_operator(written.target)
            node = self.graph.create_node("call_function", target, args, kwargs, written.name)
            node.meta["val"] = self._value(written.value)
        return node

    def _argument(self, written: Any) -> Any:
        if isinstance(written, list):
            return [self._argument(item) for item in written]
        if not isinstance(written, dict):
            return written
        kind, value = _only_item(written)
        if kind == "tuple" and isinstance(value, list):
            return tuple(self._argument(item) for item in value)
        if kind == "node" and type(value) is int and 0 <= value < len(self._nodes):
            return self._nodes[value]
        if isinstance(value, str) and value in _NAMED.get(kind, {}):
            return _NAMED[kind][value]
        raise ValueError(f"{written} is no argument")

    def _value(self, written: Any) -> Any:
        if written is None:
            return None
        kind, value = _only_item(written)
        if kind == "scalar":
            return self._sizes.read(value)
        if not isinstance(value, list):
            raise ValueError(f"{written} is no value")
        if kind == "tensor":
            # Layers repeat, and a fake tensor takes a millisecond to make: nodes share them.
            key = repr(value)
            if key not in self._tensors:
                self._tensors[key] = self._tensor(value)
            return self._tensors[key]
        if kind not in ("list", "tuple"):
            raise ValueError(f"{written} is no value")
        items = [self._value(item) for item in value]
        return items if kind == "list" else tuple(items)

    def _tensor(self, written: list[Any]) -> Tensor:
        match written:
            case [str(dtype), list(shape), list(strides)] if (
                dtype in DTYPES and len(shape) == len(strides) <= _MAX_RANK
            ):
                sizes, steps = ([self._size(item) for item in part] for part in (shape, strides))
            case _:
                raise ValueError(f"{written} is no tensor")
        try:
            with self._sizes.mode:
                return torch.empty_strided(sizes, steps, dtype=DTYPES[dtype], device="meta")
        except RuntimeError as error:
            raise ValueError(f"{written} is no tensor: {error}") from error

    def _size(self, written: Any) -> Any:
        size = self._sizes.read(written)
        if isinstance(size, torch.SymInt):
            return size
        if type(size) is not int or not 0 <= size <= _MAX_SIZE:
            raise ValueError(f"{written!r} is no size")
        return size


def _only_item(written: Any) -> tuple[str, Any]:
    if not isinstance(written, dict) or len(written) != 1:
        raise ValueError(f"{written!r} is no object with one key")
    return next(iter(written.items()))
