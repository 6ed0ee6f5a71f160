"""Rotations by Hadamard matrices spread outliers over all channels: QuaRot."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Literal

import torch
from torch import fx

from qcompile.analysis.families import Family
from qcompile.analysis.roles import DOWN_PROJ, O_PROJ, linear_role, linears_by_input, weight_name
from qcompile.analysis.sites import Site, find_sites
from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult, Skip
from qcompile.passes.transform.absorb import absorb
from qcompile.passes.transform.insert import insert_before, rotate_queries_and_keys
from qcompile.passes.transform.values import Rotation, random_hadamard, random_orthogonal

RotationKind = Literal["hadamard", "orthogonal", "none"]
"""A randomized Hadamard matrix, a random orthogonal one, or none."""

OnlineRole = Literal["down_proj", "o_proj", "query_key"]
"""What a rotation that stays in the program stands in front of: a linear behind an activation, a
linear behind attention, or attention itself."""


class Rotate(Pass):
    """Rotates the residual stream, the values of each head, and what cannot be rotated in weights.

    The residual stream and values are rotated for nothing: ``W_in Q``, ``Q^T W_out`` in the weights
    around them. Before a linear behind an activation, and on queries and keys after their rotary
    embedding, a Hadamard transform stays in the program::

        linear(x, W)          =>  linear(qc.transform(x, H), W H)
        qc.attention(q, k)    =>  qc.attention(qc.transform(q, H), qc.transform(k, H))

    Everything is found by dataflow; a stream that cannot be rotated is skipped with its reason. The
    result's details say which matrix each size was given: ``place, weights, rotation``.

    Args:
        residual: What rotates the residual stream, the same matrix everywhere.
        value: What rotates the values of a head, the same matrix for all heads of a layer.
        online: Where Hadamard transforms stay in the program.
        seed: Added to the compilation's own, for signs and random matrices.

    Source: Ashkboos et al. 2024 (QuaRot, arXiv 2404.00456).
    """

    requires = frozenset({Fact.GAINS_FOLDED})
    numerics = Equivalent()

    def __init__(
        self,
        residual: RotationKind = "hadamard",
        value: RotationKind = "hadamard",
        online: Iterable[OnlineRole] = ("down_proj", "query_key"),
        seed: int = 0,
    ) -> None:
        self._kinds = {"residual stream": residual, "values": value}
        self._online = frozenset(online)
        self._seed = seed

    def run(self, program: Program, context: Context) -> PassResult:
        """Rotates every site and every place that was asked for."""
        result = PassResult()
        generator = torch.Generator().manual_seed(context.seed + self._seed)
        for place, site in rotation_sites(program):
            kind = self._kinds[place]
            if kind == "none":
                continue
            if Family.ORTHOGONAL not in site.families:
                reasons = [b.reason for b in site.blockers if b.family is Family.ORTHOGONAL]
                result.skips.append(Skip(site.sources[0], "; ".join(dict.fromkeys(reasons))))
                continue
            rotation = _rotation(kind, site.size, generator)
            absorb(program, site, [rotation.value] * len(site.blocks))
            result.rewrites += 1
            result.details.append(_detail(place, [*site.sources, *site.sinks], rotation))
        for linears in _linears_with_role(program, self._online):
            rotation = random_hadamard(_input_width(linears[0]), None, online=True)
            insert_before(program, linears, rotation.value)
            result.rewrites += 1
            names = [weight_name(linear) for linear in linears]
            result.details.append(_detail("online", names, rotation))
        if "query_key" in self._online:
            for attention in program.calls(dialect.attention):
                rotation = random_hadamard(_input_width(attention), None, online=True)
                rotate_queries_and_keys(program, attention, rotation.value)
                result.rewrites += 1
                result.details.append(_detail("queries and keys", [attention.name], rotation))
        return result


def rotation_sites(program: Program) -> Iterator[tuple[str, Site]]:
    """The residual streams and the values of heads, with what they are called in reports.

    A residual stream is a basis that a normalization reads; values are what a linear behind
    attention reads.
    """
    after_attention = {
        weight_name(linear)
        for x, linears in linears_by_input(program)
        for linear in linears
        if linear_role(linear) == O_PROJ
    }
    for site in find_sites(program):
        considered = site.families | {blocker.family for blocker in site.blockers}
        if Family.ORTHOGONAL not in considered or not site.sinks:
            continue
        if site.reads_norm:
            yield "residual stream", site
        elif set(site.sinks) <= after_attention:
            yield "values", site


def _input_width(node: fx.Node) -> int:
    """Channels of what a linear reads, or of a head's queries."""
    value = node.args[0]
    assert isinstance(value, fx.Node)
    return int(value.meta["val"].shape[-1])


def _rotation(kind: RotationKind, size: int, generator: torch.Generator) -> Rotation:
    if kind == "hadamard":
        return random_hadamard(size, generator, online=False)
    return Rotation(random_orthogonal(size, generator), f"a random orthogonal matrix for {size}")


def _linears_with_role(program: Program, roles: Collection[str]) -> Iterator[list[fx.Node]]:
    for _, linears in linears_by_input(program):
        chosen = [n for n in linears if linear_role(n) in {DOWN_PROJ, O_PROJ} & set(roles)]
        if chosen:
            yield chosen


def _detail(place: str, weights: list[str], rotation: Rotation) -> dict[str, object]:
    return {"place": place, "weights": weights, "rotation": rotation.choice}
