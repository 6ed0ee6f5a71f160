"""`Program`: a functional fx graph, the weights it names, and what is known of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qcompile.errors import ModelError
from qcompile.ir.types import PAST_ROLES, Fact, ProgramOutput, Provenance, Role, Signature
from qcompile.ir.weights import WeightStore


@dataclass
class Program:
    """A model between front end and target.

    The graph holds only `placeholder`, `get_attr` (a weight, by its name in `weights`),
    `call_function` (ATen, `qc::`, or Python arithmetic on sizes) and `output` nodes. Every node
    carries ``meta["val"]``: a fake tensor or a symbolic size. No numbers live in the graph, so
    copies are cheap.

    Attributes:
        graph: The nodes, in order.
        weights: The numbers behind `get_attr` nodes.
        signature: Inputs and outputs with their roles.
        facts: What passes have established.
        provenance: Where it came from.
        notes: Observations for the report, such as why a region stayed as it was: one line each.
        cache_basis: By the name of the input, how cached keys or values differ from those of the
            captured model: each head's rows are multiplied by ``[heads or 1, D, D]`` float64. For
            checks only; it is not saved.
    """

    graph: fx.Graph
    weights: WeightStore
    signature: Signature
    facts: frozenset[Fact] = frozenset()
    provenance: Provenance = field(default_factory=Provenance)
    notes: tuple[str, ...] = ()
    cache_basis: Mapping[str, Tensor] = field(default_factory=dict)
    _materialized: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def copy(self) -> Program:
        """An independent program over the same numbers."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        results = graph.graph_copy(self.graph, mapping)
        graph.output(results).meta = dict(self.output_node.meta)
        return replace(self, graph=graph, weights=self.weights.copy())

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders, in the order of the signature."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output_node(self) -> fx.Node:
        """The node that ends the graph."""
        node: fx.Node = next(reversed(self.graph.nodes))
        assert node.op == "output"
        return node

    @property
    def results(self) -> list[fx.Node]:
        """The nodes that the program returns, in the order of the signature."""
        return list(self.output_node.args[0])  # type: ignore[arg-type]

    def calls(self, *targets: Callable[..., Any]) -> Iterator[fx.Node]:
        """The calls of the given operators (all calls when none is given), in graph order."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and (not targets or node.target in targets):
                yield node

    def parameters(self) -> Iterator[fx.Node]:
        """The `get_attr` nodes, in graph order."""
        for node in list(self.graph.nodes):
            if node.op == "get_attr":
                yield node

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode that owns the fake values in this graph."""
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                return value.fake_mode
        raise ModelError("the program has no tensors")

    @property
    def graph_module(self) -> fx.GraphModule:
        """The same graph as an `fx.GraphModule` with meta tensors, for fx's own tools."""
        attributes = {
            str(node.target): torch.empty(
                self.weights.spec(str(node.target)).shape,
                dtype=self.weights.spec(str(node.target)).dtype,
                device="meta",
            )
            for node in self.parameters()
        }
        return fx.GraphModule(attributes, self.copy().graph)

    def tidy(self) -> int:
        """Removes dead nodes and weights that no node names; returns how many nodes went.

        To be called after every edit: it also forgets weights kept from earlier calls.
        """
        before = len(self.graph.nodes)
        self._materialized.clear()
        self.graph.eliminate_dead_code()
        self.weights.keep_only({str(node.target) for node in self.parameters()})
        return before - len(self.graph.nodes)

    def text(self) -> str:
        """The stable text form; see `qcompile.ir.text`."""
        from qcompile.ir.text import format_program

        return format_program(self)

    def verify(self, *, shapes: bool = False) -> None:
        """Checks that the program is well formed; see `qcompile.ir.verify`."""
        from qcompile.ir.verify import verify_program

        verify_program(self, shapes=shapes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Interprets the program in float32.

        Language models take ``input_ids [B, S]`` and optionally ``attention_mask [B, P + S]``,
        ``position_ids [B, S]`` and ``past_key_values`` (flat, as returned), and return a
        `ProgramOutput`. Other models take and return what the original did. Weights stay in
        memory for the next call.
        """
        from qcompile.ir.interpreter import Interpreter

        outputs = Interpreter(self, cache=self._materialized).run(*self.bind(*args, **kwargs))
        return self.unbind(outputs)

    def bind(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Arguments as a caller gives them, to one tensor per placeholder.

        Raises:
            ModelError: If they do not fit the signature.
        """
        if self.signature.input_tree is not None:
            flat, tree = pytree.tree_flatten((args, kwargs))
            if tree != self.signature.input_tree:
                raise ModelError(
                    "the arguments do not have the structure of the example inputs",
                    remedy=f"the program was captured with {self.signature.input_tree}",
                )
            return [value for value in flat if isinstance(value, Tensor)]
        return _bind_language_model(self, *args, **kwargs)

    def unbind(self, outputs: tuple[Tensor, ...]) -> Any:
        """One tensor per result, to what the original model returns."""
        if self.signature.output_tree is not None:
            return pytree.tree_unflatten(list(outputs), self.signature.output_tree)
        return ProgramOutput(outputs)


def _bind_language_model(
    program: Program,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: tuple[Tensor, ...] | None = None,
    token_type_ids: Tensor | None = None,
) -> list[Tensor]:
    batch, query = input_ids.shape
    past = _past_length(program, query, attention_mask, past_key_values)
    if attention_mask is None:
        attention_mask = torch.ones(batch, past + query, dtype=torch.int64)
    if attention_mask.shape != (batch, past + query):
        raise ModelError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected "
            f"{[batch, past + query]} (batch, past + query)"
        )
    attention_mask = attention_mask.to(torch.int64)
    if position_ids is None:
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -query:]
    cache = iter(past_key_values or ())
    bound: list[Tensor] = []
    for port, node in zip(program.signature.inputs, program.inputs, strict=True):
        match port.role:
            case Role.INPUT_IDS:
                bound.append(input_ids)
            case Role.ATTENTION_MASK:
                bound.append(attention_mask)
            case Role.POSITION_IDS:
                bound.append(position_ids)
            case Role.TOKEN_TYPE_IDS:
                bound.append(
                    torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
                )
            case role if role in PAST_ROLES:
                empty = _empty_cache(node.meta["val"], role, batch)
                bound.append(empty if past_key_values is None else next(cache))
            case role:
                raise ModelError(f"input '{port.name}' with role '{role.value}' has no value")
    return bound


def _past_length(
    program: Program,
    query: int,
    attention_mask: Tensor | None,
    past_key_values: tuple[Tensor, ...] | None,
) -> int:
    """Tokens per row before the new ones: keys are as long, states do not tell."""
    if not past_key_values:
        return 0
    pasts = [port for port in program.signature.inputs if port.role in PAST_ROLES]
    for port, value in zip(pasts, past_key_values, strict=False):
        if port.role is Role.PAST_KEY:
            return int(value.shape[2])
    if attention_mask is None:
        raise ModelError(
            "the cache holds states only, which do not tell how many tokens came before",
            remedy="pass attention_mask [batch, past + query]",
        )
    return int(attention_mask.shape[1]) - query


def _empty_cache(held: Tensor, role: Role, batch: int) -> Tensor:
    """What a layer keeps before the first token: no keys and values, or a state of zeros."""
    if role is Role.PAST_STATE:
        return torch.zeros((batch, *map(int, held.shape[1:])), dtype=held.dtype)
    return torch.empty((batch, int(held.shape[1]), 0, int(held.shape[3])), dtype=held.dtype)
