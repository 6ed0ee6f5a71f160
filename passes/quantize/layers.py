"""Which weights of a program can become codes, and what part they play."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import fx

from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.ir.text import format_target
from qcompile.ir.types import Role

LINEAR = torch.ops.aten.linear.default
EMBEDDING = torch.ops.aten.embedding.default

_aten = torch.ops.aten
_SAME_VALUES = frozenset(
    {_aten.view.default, _aten.reshape.default, _aten.unsqueeze.default, _aten.expand.default}
    | {_aten.squeeze.dim, _aten.slice.Tensor, _aten.clone.default, _aten.contiguous.default}
    | {_aten.flatten.using_ints, _aten._to_copy.default, _aten.to.dtype, _aten.alias.default}
)
"""Operators that keep token ids what they are: they move or cast them."""

_UP, _DOWN = 3, 5
"""Where the matrices stand among the arguments of `qc.experts`."""

_NOT_TOKENS = frozenset({Role.POSITION_IDS, Role.TOKEN_TYPE_IDS, Role.ATTENTION_MASK})


class Part(Enum):
    """What a layer does in the model, found by dataflow."""

    LINEAR = "linear"
    LM_HEAD = "lm_head"
    """The linear that makes the logits."""
    TOKEN_EMBEDDING = "embedding"
    """The table that an input of the program indexes."""
    OTHER_EMBEDDING = "other embedding"
    """A table of positions or token types."""
    EXPERTS = "experts"
    """The stacked matrices of routed experts, [E, N, K]."""


@dataclass
class LayerWeight:
    """A stored float weight that only linears, embeddings and routed experts use.

    Attributes:
        name: Its entry in the weight store.
        references: The `get_attr` nodes that name it, in graph order.
        parts: What its users do; several for tied weights.
    """

    name: str
    references: list[fx.Node] = field(default_factory=list)
    parts: set[Part] = field(default_factory=set)

    @property
    def tied(self) -> bool:
        """Whether the tensor serves an embedding and a linear."""
        linear = {Part.LINEAR, Part.LM_HEAD} & self.parts
        return bool(linear) and bool(self.parts - linear)


def layer_weights(program: Program) -> tuple[list[LayerWeight], dict[str, str]]:
    """The weights that can become codes, in graph order.

    Returns:
        Those weights, and for every other float weight of two and more dimensions the reason why
        it cannot, by name.
    """
    head = output_projection(program)
    roles = dict(zip(program.inputs, (p.role for p in program.signature.inputs), strict=True))
    found: dict[str, LayerWeight] = {}
    excluded: dict[str, str] = {}
    for reference in program.parameters():
        name = str(reference.target)
        spec = program.weights.spec(name)
        if not spec.dtype.is_floating_point or len(spec.shape) < 2:
            continue
        weight = found.setdefault(name, LayerWeight(name))
        weight.references.append(reference)
        for user in reference.users:
            part = _part(reference, user, head, roles)
            if part is None:
                excluded.setdefault(name, _reason(user))
            else:
                weight.parts.add(part)
    return [weight for name, weight in found.items() if name not in excluded], excluded


def output_projection(program: Program) -> fx.Node | None:
    """The linear that makes the logits, or None where there is none.

    Looks from the logits backwards through operators with one data operand (slices, casts, scaling,
    soft-capping).
    """
    for port, result in zip(program.signature.outputs, program.results, strict=True):
        if port.role is Role.LOGITS:
            return next((n for n in _chain(result) if n.target == LINEAR), None)
    return None


def _part(
    reference: fx.Node, user: fx.Node, head: fx.Node | None, roles: dict[fx.Node, Role]
) -> Part | None:
    if user.target == LINEAR and user.args[1] is reference and user.args[0] is not reference:
        return Part.LM_HEAD if user is head else Part.LINEAR
    if user.target == dialect.experts and reference in (user.args[_UP], user.args[_DOWN]):
        return Part.EXPERTS
    if user.target == EMBEDDING and user.args[0] is reference:
        indices = user.args[1]
        assert isinstance(indices, fx.Node)
        # Positions may come from a stored table of them: then there is no origin to find.
        origin = next((n for n in _chain(indices) if n.target not in _SAME_VALUES), None)
        tokens = origin in roles and roles[origin] not in _NOT_TOKENS
        return Part.TOKEN_EMBEDDING if tokens else Part.OTHER_EMBEDDING
    return None


def _reason(user: fx.Node) -> str:
    if user.target == dialect.experts:
        return "biases of experts stay float"
    return f"used by {format_target(user.target)}"


def _chain(node: fx.Node) -> Iterator[fx.Node]:
    """A node and what it is computed from, for as long as that is one tensor."""
    while True:
        yield node
        if node.op != "call_function":
            return
        operands = [
            operand
            for operand in node.all_input_nodes
            if operand.op != "get_attr" and isinstance(operand.meta.get("val"), torch.Tensor)
        ]
        if len(operands) != 1:
            return
        node = operands[0]
