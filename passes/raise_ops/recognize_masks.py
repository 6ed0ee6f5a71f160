"""Attention masks become attributes where probing proves what they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact, Role
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult, Skip
from qcompile.passes.raise_ops.regions import NotClosedError, Probe

_MAX_WINDOW = 1 << 18
"""Integers beyond this are no windows: slices that end nowhere, lowest values."""

_MAX_QUERY = 1 << 10
"""Most queries that are probed where there is a past, which makes masks of long windows small."""

_MAX_SQUARE = 1 << 12
"""Longest sequence that is probed where there is no past, so that masks are square."""


@dataclass(frozen=True)
class MaskKind:
    """What a mask means: which of the three conditions a query puts on a key."""

    padding: bool
    causal: bool
    window: int


class RecognizeMasks(Pass):
    """``attention(q, k, v, mask)``  =>  ``attention(q, k, v, key_mask, causal, window)``.

    The mask's region is run on random paddings and on lengths around every constant that it
    contains; only a mask that equals one combination of padding, causality and window everywhere
    is replaced. Others stay operands.
    """

    requires = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Recognizes each distinct mask once."""
        result = PassResult()
        editor = Editor(program)
        key_mask = next(
            (
                node
                for node, port in zip(program.inputs, program.signature.inputs, strict=True)
                if port.role is Role.ATTENTION_MASK
            ),
            None,
        )
        kinds: dict[fx.Node, MaskKind | None] = {}
        for node in program.calls(dialect.attention):
            mask = node.args[3]
            if not isinstance(mask, fx.Node):
                continue
            if mask not in kinds:
                kinds[mask] = recognize(program, mask, key_mask, context.seed)
                if kinds[mask] is None:
                    result.skips.append(
                        Skip(mask.name, "a mask that is no padding, causal or window mask")
                    )
            kind = kinds[mask]
            if kind is None:
                continue
            query, key, value, _, _, sinks, scale, _, _, softcap = node.args
            with editor.before(node):
                new = editor.call(
                    dialect.attention,
                    *(query, key, value, None, key_mask if kind.padding else None),
                    *(sinks, scale, kind.causal, kind.window, softcap),
                )
            editor.replace(node, new)
            result.rewrites += 1
        return result


def recognize(
    program: Program, mask: fx.Node, key_mask: fx.Node | None, seed: int
) -> MaskKind | None:
    """What a mask is, or None."""
    candidates = [0, *_constants(mask)]
    keeps_past = any(port.role is Role.PAST_KEY for port in program.signature.inputs)
    if not keeps_past and candidates[-1] > _MAX_SQUARE:
        return None
    cases = [_case(program, mask, seed, past=p, query=5) for p in (0, 9)]
    if any(case is None for case in cases):
        return None
    far: list[_Case | None] = []
    for padding, causal, window in product((True, False), (True, False), candidates):
        kind = MaskKind(padding and key_mask is not None, causal, window)
        if padding and key_mask is None:
            continue
        if all(_agrees(kind, *case) for case in cases if case is not None):
            far = far or list(_far_cases(program, mask, seed, candidates))
            if all(case is not None and _agrees(kind, *case) for case in far):
                return kind
    return None


def _far_cases(
    program: Program, mask: fx.Node, seed: int, candidates: list[int]
) -> Iterator[_Case | None]:
    """Cases in which a query is further from a key, on either side, than any constant says."""
    for window in candidates:
        yield _case(program, mask, seed, past=window + 2, query=3)
    longest = max((w for w in candidates if w <= _MAX_QUERY), default=0)
    yield _case(program, mask, seed, past=0, query=longest + 3)


_Case = tuple[Tensor, Tensor | None, int]


def _case(program: Program, mask: fx.Node, seed: int, past: int, query: int) -> _Case | None:
    """The mask as the program computes it, the padding it was given, and the past."""
    generator = torch.Generator().manual_seed(seed + past)
    batch, given = 3 if query + past <= 256 else 1, dict[fx.Node, Any]()
    padding: Tensor | None = None
    has_past = any(port.role is Role.PAST_KEY for port in program.signature.inputs)
    if not has_past:
        past, query = 0, past + query
    for node, port in zip(program.inputs, program.signature.inputs, strict=True):
        match port.role:
            case Role.ATTENTION_MASK:
                padding = torch.rand(batch, past + query, generator=generator) < 0.7
                padding[:, -1] = True
                given[node] = padding.to(torch.int64)
            case Role.PAST_KEY | Role.PAST_VALUE:
                _, heads, _, width = node.meta["val"].shape
                given[node] = torch.zeros(1, 1, 1, 1).expand(batch, int(heads), past, int(width))
            case Role.PAST_STATE:
                pass  # no mask follows from a state: the probe would say so
            case Role.POSITION_IDS:
                positions = torch.arange(past, past + query).expand(batch, query)
                if padding is not None:
                    positions = (padding.cumsum(-1) - 1).clamp(min=0)[:, past:]
                given[node] = positions
            case Role.INPUT_IDS | Role.TOKEN_TYPE_IDS:
                given[node] = torch.zeros(batch, query, dtype=torch.int64)
            case _:
                return None
    try:
        value = Probe(program).run(mask, given)
    except (NotClosedError, RuntimeError):
        return None
    if not isinstance(value, Tensor) or value.dim() != 4:
        return None
    if value.dtype != torch.bool:
        blocked = value <= -1e4  # no weight is left by such a score
        if not bool(((value == 0) | blocked).all()):
            return None
        value = ~blocked
    if value.shape[-1] != past + query:
        return None
    return value.expand(batch, 1, query, past + query), padding, past


def _agrees(kind: MaskKind, mask: Tensor, padding: Tensor | None, past: int) -> bool:
    batch, _, query, total = mask.shape
    position = torch.arange(past, past + query).unsqueeze(-1)
    keys = torch.arange(total)
    expected = torch.ones(batch, 1, query, total, dtype=torch.bool)
    if kind.padding and padding is not None:
        expected = expected & padding[:, None, None, :]
    if kind.causal:
        expected = expected & (keys <= position)
    if kind.window:
        expected = expected & (keys > position - kind.window)
    # A row that may attend to nothing has no defined result; models fill it in as they like.
    alive = expected.any(-1, keepdim=True)
    return bool(((mask == expected) | ~alive).all())


def _constants(mask: fx.Node) -> list[int]:
    """Integers in the mask's region, each also plus and minus one: candidates for a window."""
    found: set[int] = set()
    pending, seen = [mask], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        pending.extend(node.all_input_nodes)
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found |= {abs(int(value)) + shift for shift in (-1, 0, 1)}
    return sorted(value for value in found if 1 < value <= _MAX_WINDOW)
