"""The compiler takes over the key/value cache."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact, Role
from qcompile.passes.infra import Context, Exact, PassResult, Skip
from qcompile.passes.rule import ApplyRules, Const, Match, Rule

aten = torch.ops.aten

_CACHE = (Role.PAST_KEY, Role.PAST_VALUE)


class OwnCache(ApplyRules):
    """Makes every growing cache explicit; a cache that is used otherwise is reported."""

    requires = frozenset({Fact.CANONICAL})
    ensures = frozenset({Fact.CACHE_OWNED})
    numerics = Exact()

    def __init__(self) -> None:
        super().__init__((AppendToCache(), SizeOfCache()), report_misses=False)

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites all layers."""
        result = super().run(program, context)
        result.skips += [
            Skip(str(cache.target), f"the cache is also read by '{user.name}'")
            for cache in _inputs(program, *_CACHE)
            for user in cache.users
            if user.target is not dialect.kv_append
        ]
        return result


class AppendToCache(Rule):
    """``cat([past, new], -2)`` with an input `past` of a cache role  =>  ``kv_append``."""

    def pattern(self, past: Tensor, new: Tensor, dim: Const) -> Any:
        """Two values, one behind the other."""
        return aten.cat.default([past, new], dim)

    def check(self, match: Match) -> str | None:
        """The first must be a cache, and the axis that of its positions."""
        if match["past"] not in _inputs(match.program, *_CACHE):
            return "what comes first is no cache"
        return None if match["dim"] in (-2, 2) else "the axis is not that of the positions"

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """The cache, grown."""
        return edit.call(dialect.kv_append, match["past"], match["new"])


class SizeOfCache(Rule):
    """Batch and past, read from a cache  =>  the same from the ids and the mask.

    So a target may keep the cache in a larger buffer than the positions that it holds.
    """

    def pattern(self, past: Tensor, dim: Const) -> Any:
        """A size."""
        return aten.sym_size.int(past, dim)

    def check(self, match: Match) -> str | None:
        """It must be one of the two sizes of a cache, and there must be ids and a mask."""
        if match["past"] not in _inputs(match.program, *_CACHE) or match["dim"] not in (0, 2):
            return "no batch or past of a cache"
        needed = (Role.INPUT_IDS, Role.ATTENTION_MASK)
        return None if len(_inputs(match.program, *needed)) == 2 else "no ids, or no mask"

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """The batch of the ids; or what the mask has more than the ids."""
        (ids,) = _inputs(edit.program, Role.INPUT_IDS)
        (mask,) = _inputs(edit.program, Role.ATTENTION_MASK)
        if match["dim"] == 0:
            return edit.call(aten.sym_size.int, ids, 0)
        total = edit.call(aten.sym_size.int, mask, 1)
        return edit.call(operator.sub, total, edit.call(aten.sym_size.int, ids, 1))


def _inputs(program: Program, *roles: Role) -> list[fx.Node]:
    """The inputs that have one of the given roles."""
    return [
        node
        for node, port in zip(program.inputs, program.signature.inputs, strict=True)
        if port.role in roles
    ]
