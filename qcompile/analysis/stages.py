"""Stages: a program cut where everything that it computes passes through one value.

A language model is a chain of blocks that hand one value, the residual stream, to the next. Work
that goes over a whole model (checking it, calibrating it) goes stage by stage, so that only one
stage's weights need be in memory. The cuts are found in the dataflow, not by names: they are the
values through which all paths from the model's content to its output lead, and of those the ones
in front of the part that repeats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.program import Program
from qcompile.ir.types import PAST_ROLES, PRESENT_ROLES, Role

aten = torch.ops.aten

_CONTEXT_ROLES = frozenset(
    {
        Role.ATTENTION_MASK,
        Role.POSITION_IDS,
        Role.LOGIT_POSITIONS,
        *PAST_ROLES,
    }
)
"""Inputs that say where the content stands and what came before; every block may read them."""

_TRIVIAL = frozenset(
    {
        "alias",
        "clone",
        "contiguous",
        "detach",
        "expand",
        "getitem",
        "permute",
        "reshape",
        "slice",
        "squeeze",
        "t",
        "to",
        "_to_copy",
        "transpose",
        "unsqueeze",
        "view",
    }
)
"""Operators that move or rename values: they do not tell one kind of block from another."""


@dataclass(frozen=True)
class Stage:
    """A part of a program that can run when the stages before it have run.

    Attributes:
        index: Its place among the stages.
        block: Which repetition of the repeating part it is; None for what stands before, after or
            beside that part.
        nodes: Its weights and calls, in graph order. What depends on weights alone belongs to
            every stage that uses it; every other node to exactly one stage.
        inputs: Values from outside that its nodes read: inputs of the program, and values of
            earlier stages.
        outputs: Its values that later stages read or the program returns.
        boundary: The one content value that it hands to the stages after it; None for a stage of
            shared values and for the last one.
        weights: Names of the entries in the weight store that it reads.
    """

    index: int
    block: int | None
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    boundary: fx.Node | None
    weights: tuple[str, ...]


def stages(program: Program) -> list[Stage]:
    """Cuts a program into stages, in the order in which they can run.

    If some values that do not depend on the content (masks, rotary tables, sizes) are read by
    several stages, the first stage computes them. A program without a repeating part is one stage
    (behind that one). Dead nodes belong to no stage. Time is linear in the size of the graph.

    Args:
        program: Any program: captured, canonical, raised, quantized or lowered.
    """
    flow = Flow(program)
    cuts = _blocks(flow)
    place = _place(flow, cuts)
    return _build(flow, cuts, place)


class Flow:
    """What each node of a program depends on.

    Attributes:
        program: The program.
        needed: Calls, weights and inputs that some result depends on.
        constant: Nodes that depend on weights and literals only.
        content: Tensors that carry content: what comes from floating inputs and from embeddings
            of the ids, as opposed to positions, masks and sizes.
        dynamic: Nodes that depend on content in any way, be it only on its sizes.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.needed = _ancestors(program.results)
        self.order = [node for node in program.graph.nodes if node in self.needed]
        self.constant: set[fx.Node] = set()
        self.content: set[fx.Node] = set()
        self.dynamic: set[fx.Node] = set()
        roles = {
            node: port.role
            for node, port in zip(program.inputs, program.signature.inputs, strict=True)
        }
        ids: set[fx.Node] = set()
        for node in self.order:
            operands = node.all_input_nodes
            if node.op == "placeholder":
                if roles[node] not in _CONTEXT_ROLES:
                    (self.content if _is_floating(node) else ids).add(node)
            elif all(operand in self.constant for operand in operands):
                self.constant.add(node)
            elif _has_tensors(node):
                if any(operand in self.content for operand in operands):
                    self.content.add(node)
                elif any(operand in ids for operand in operands):
                    (self.content if self._embeds(node) else ids).add(node)
            if node in self.content or any(operand in self.dynamic for operand in operands):
                self.dynamic.add(node)

    def _embeds(self, node: fx.Node) -> bool:
        """Whether a node that reads ids turns them into numbers with the help of a weight."""
        return _is_floating(node) and any(
            operand in self.constant and _is_matrix(operand) for operand in node.all_input_nodes
        )

    def content_result(self) -> fx.Node | None:
        """The last result that carries content and is no cache."""
        found = [
            node
            for node, port in zip(self.program.results, self.program.signature.outputs, strict=True)
            if node in self.content and port.role not in PRESENT_ROLES
        ]
        return max(found) if found else None


@dataclass(frozen=True)
class _Cuts:
    """Where the chain of content is cut.

    Attributes:
        spine: The content nodes that the last result depends on, in order.
        ends: Positions in `spine` of the last node of each part.
        blocks: For each part, its number among the repetitions, or None.
    """

    spine: list[fx.Node]
    ends: list[int]
    blocks: list[int | None]


def _blocks(flow: Flow) -> _Cuts:
    result = flow.content_result()
    if result is None:
        return _Cuts([], [], [])
    spine = sorted(_ancestors([result], within=flow.content))
    segments = _segments(spine, _single_value_positions(spine))
    starts, last_end = _repetition([_kind(flow, spine, segment) for segment in segments])
    firsts = sorted({0, *starts, last_end})
    ends = [segments[first - 1].stop - 1 for first in firsts[1:] if first < len(segments)]
    count = {first: number for number, first in enumerate(starts)}
    blocks = [count.get(first) for first in firsts if first < len(segments)]
    return _Cuts(spine, [*ends, len(spine) - 1], blocks)


def _single_value_positions(spine: Sequence[fx.Node]) -> list[int]:
    """Positions of the nodes that every path through the spine leads through.

    In any topological order of nodes that all lie between source and sink, these are the nodes
    that no edge jumps over.
    """
    position = {node: i for i, node in enumerate(spine)}
    sources = [
        i
        for node, i in position.items()
        if not any(operand in position for operand in node.all_input_nodes)
    ]
    reach = max(sources)
    found = []
    for node, i in position.items():
        if reach <= i and _is_floating(node):
            found.append(i)
        reach = max([reach, *(position[user] for user in node.users if user in position)])
    return found


def _segments(spine: Sequence[fx.Node], cuts: Sequence[int]) -> list[range]:
    """The positions between consecutive cuts, each cut being the last of its segment."""
    ends = sorted({*cuts, len(spine) - 1})
    return [range(start + 1, end + 1) for start, end in zip([-1, *ends], ends, strict=False)]


@dataclass(frozen=True)
class _Kind:
    """What a segment computes, roughly: its operators, sorted, and whether it has matrices."""

    operators: tuple[str, ...]
    has_matrices: bool


def _kind(flow: Flow, spine: Sequence[fx.Node], segment: range) -> _Kind:
    nodes = [spine[i] for i in segment]
    operators = tuple(sorted(name for node in nodes if (name := _operator(node)) not in _TRIVIAL))
    has_matrices = any(
        operand in flow.constant and _is_matrix(operand)
        for node in nodes
        for operand in node.all_input_nodes
    )
    return _Kind(operators, has_matrices)


def _repetition(kinds: Sequence[_Kind]) -> tuple[list[int], int]:
    """Where the repetitions of the repeating part start, and where the last one ends.

    A block starts with the first kind of segment, among those with matrices, that occurs most
    often. The last one ends where an earlier one would.
    """
    counts = Counter(kind for kind in kinds if kind.has_matrices)
    most = max(counts.values(), default=0)
    if most < 2:
        return [], len(kinds)
    leader = next(kind for kind in kinds if counts[kind] == most)
    starts = [i for i, kind in enumerate(kinds) if kind == leader]
    earlier = {tuple(kinds[a:b]) for a, b in pairwise(starts)}
    tail = tuple(kinds[starts[-1] :])
    lengths = [len(block) for block in earlier if tail[: len(block)] == block]
    return starts, starts[-1] + max(lengths, default=len(tail))


_SHARED = 0
"""Where values live that no content flows into; the parts of the spine follow from 1."""


def _place(flow: Flow, cuts: _Cuts) -> dict[fx.Node, int]:
    """The part of every call that is not constant."""
    place: dict[fx.Node, int] = {}
    start = 0
    for number, end in enumerate(cuts.ends, start=1):
        place |= dict.fromkeys(cuts.spine[start : end + 1], number)
        start = end + 1
    for node in flow.order:
        if node in flow.constant or node.op == "placeholder":
            place.pop(node, None)
        elif node not in place:
            place[node] = max((place.get(n, _SHARED) for n in node.all_input_nodes), default=0)
    results = set(flow.program.results)
    for node in reversed(flow.order):
        # What a single stage reads is computed there, and not kept for all of them.
        if place.get(node) == _SHARED and node not in results:
            readers = {place[user] for user in node.users if user in place}
            if len(readers) == 1:
                place[node] = readers.pop()
    return place


def _build(flow: Flow, cuts: _Cuts, place: Mapping[fx.Node, int]) -> list[Stage]:
    parts: list[list[fx.Node]] = [[] for _ in range(len(cuts.ends) + 1)]
    for node, number in place.items():
        parts[number].append(node)
    # A result that is a weight, or nothing but literals, has no other place.
    parts[-1] += [node for node in flow.program.results if node in flow.constant]
    boundaries = [None, *(cuts.spine[end] for end in cuts.ends[:-1]), None]
    blocks = [None, *cuts.blocks, None]
    found: list[Stage] = []
    for number, part in enumerate(parts):
        if part:
            nodes = _with_constants(part, flow.constant)
            outputs = [node for node in nodes if _leaves(flow, place, node, number)]
            found.append(_stage(len(found), blocks[number], nodes, outputs, boundaries[number]))
    return found


def _stage(
    index: int,
    block: int | None,
    nodes: list[fx.Node],
    outputs: list[fx.Node],
    boundary: fx.Node | None,
) -> Stage:
    inside = set(nodes)
    inputs = {n for node in nodes for n in node.all_input_nodes if n not in inside}
    weights = dict.fromkeys(str(node.target) for node in nodes if node.op == "get_attr")
    return Stage(
        index, block, tuple(nodes), tuple(sorted(inputs)), tuple(outputs), boundary, tuple(weights)
    )


def _leaves(flow: Flow, place: Mapping[fx.Node, int], node: fx.Node, number: int) -> bool:
    """Whether the program returns a value of part `number`, or a later part reads it."""
    if any(user.op == "output" for user in node.users):
        return True
    return node not in flow.constant and any(
        place.get(user, number) > number for user in node.users
    )


def _with_constants(nodes: Iterable[fx.Node], constant: set[fx.Node]) -> list[fx.Node]:
    """The nodes with everything constant that they depend on, in graph order."""
    found = set(nodes)
    pending = list(found)
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand in constant and operand not in found:
                found.add(operand)
                pending.append(operand)
    return sorted(found)


def _ancestors(nodes: Iterable[fx.Node], within: set[fx.Node] | None = None) -> set[fx.Node]:
    """The nodes and all that they depend on (through `within` only, where given)."""
    found = set(nodes)
    pending = list(found)
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand not in found and (within is None or operand in within):
                found.add(operand)
                pending.append(operand)
    return found


def _operator(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet or node.target, "__name__", node.target))


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _has_tensors(node: fx.Node) -> bool:
    value: Any = node.meta.get("val")
    return isinstance(value, Tensor) or (
        isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value)
    )


def _is_matrix(node: fx.Node) -> bool:
    """Whether a weight is more than a gain or a bias; packed codes are one flat row of bytes."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (value.dim() >= 2 or value.dtype == torch.uint8)
