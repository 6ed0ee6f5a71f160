"""Transforms without data: what methods that choose values leave in a program, by their shapes.

Each stand-in makes the program that its method will make, nodes, parameters and copies of weights,
with random values in place of fitted ones. No weight and no data is read, and the weights that take
the transforms must not be either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import fx

from qcompile.analysis.families import Family
from qcompile.analysis.roles import weight_name
from qcompile.analysis.sites import find_sites
from qcompile.calibration.requests import Request, Statistics
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, Pass, PassResult
from qcompile.passes.transform.absorb import absorb
from qcompile.passes.transform.duquant import Duquant
from qcompile.passes.transform.insert import (
    insert_after,
    insert_before,
    rotate_queries_and_keys,
)
from qcompile.passes.transform.quip import Quip
from qcompile.passes.transform.resq import Basis, Resq
from qcompile.passes.transform.rotate import rotation_sites
from qcompile.passes.transform.rptq import Rptq, can_reorder
from qcompile.passes.transform.spinquant import Spinquant
from qcompile.passes.transform.untie_weights import own_weight
from qcompile.passes.transform.values import (
    BlockDiagonal,
    Compose,
    Diagonal,
    Orthogonal,
    Permutation,
    Transform,
    random_hadamard,
    random_orthogonal,
)
from qcompile.passes.transform.wanted_inputs import wanted_inputs


class PlanDuquant(Duquant):
    """`Duquant` with random rotations."""

    @property
    def name(self) -> str:
        """That of the pass whose work it plans."""
        return "duquant"

    def run(self, program: Program, context: Context) -> PassResult:
        """Puts a transform before every input of linears."""
        generator = torch.Generator().manual_seed(context.seed)
        groups, skips = wanted_inputs(program, self._ignore)
        for value, linears in groups:
            n = int(value.meta["val"].shape[-1])
            block = self.block(n)
            turns = [BlockDiagonal((_rotation(block, generator),) * (n // block)) for _ in range(2)]
            insert_before(program, linears, Compose((turns[0], _order(n, generator), turns[1])))
        return PassResult(rewrites=len(groups), skips=skips)


class PlanRptq(Rptq):
    """`Rptq` with random orders, where they stay in the program."""

    @property
    def name(self) -> str:
        """That of the pass whose work it plans."""
        return "rptq"

    def run(self, program: Program, context: Context) -> PassResult:
        """Reorders the inputs that weights cannot reorder."""
        generator = torch.Generator().manual_seed(context.seed)
        groups, skips = wanted_inputs(program, self._ignore)
        free = {frozenset(site.sinks) for site in find_sites(program) if can_reorder(site)}
        for value, linears in groups:
            if frozenset(map(weight_name, linears)) not in free:
                n = int(value.meta["val"].shape[-1])
                insert_before(program, linears, _order(n, generator))
        return PassResult(rewrites=len(groups), skips=skips)


class PlanQuip(Quip):
    """`Quip` with random scales."""

    @property
    def name(self) -> str:
        """That of the pass whose work it plans."""
        return "quip"

    def run(self, program: Program, context: Context) -> PassResult:
        """Puts transforms on both sides of every linear."""
        generator = torch.Generator().manual_seed(context.seed)
        groups, skips = wanted_inputs(program, self._ignore)
        for linear in (linear for _, linears in groups for linear in linears):
            own_weight(program, weight_name(linear), linear)
        for value, linears in groups:
            n = int(value.meta["val"].shape[-1])
            inside: Transform = self._random(n, generator)
            if self._rescale:
                scale = 1 + torch.rand(n, generator=generator, dtype=torch.float64)
                inside = Compose((Diagonal(scale), inside))
            insert_before(program, linears, inside)
            for linear in linears:
                width = int(linear.meta["val"].shape[-1])
                insert_after(program, linear, self._random(width, generator))
        return PassResult(rewrites=len(groups), skips=skips)


class PlanSpinquant(Spinquant):
    """`Spinquant` with the rotations that training starts from."""

    @property
    def name(self) -> str:
        """That of the pass whose work it plans."""
        return "spinquant"

    def run(self, program: Program, context: Context) -> PassResult:
        """Absorbs a rotation at every site."""
        generator = torch.Generator().manual_seed(context.seed)
        result = PassResult()
        for _, site in rotation_sites(program):
            if Family.ORTHOGONAL in site.families:
                turn = random_hadamard(site.size, generator, online=False).value
                absorb(program, site, [turn] * len(site.blocks))
                result.rewrites += 1
        return result


class PlanResq(Resq):
    """`Resq` with random rotations."""

    @property
    def name(self) -> str:
        """That of the pass whose work it plans."""
        return "resq"

    def _measure(
        self, program: Program, requests: Sequence[Request], context: Context
    ) -> Statistics:
        del program, requests, context
        return Statistics()

    def _rotate(
        self,
        program: Program,
        basis: Basis,
        found: Statistics,
        generator: torch.Generator,
    ) -> dict[str, object]:
        del found
        turn = random_hadamard(basis.site.size, generator, online=False).value
        absorb(program, basis.site, [turn] * len(basis.site.blocks))
        return {}

    def _rotate_keys(
        self,
        program: Program,
        attention: fx.Node,
        key: fx.Node,
        found: Statistics,
        generator: torch.Generator,
    ) -> dict[str, object]:
        del found
        width = int(key.meta["val"].shape[-1])
        rotate_queries_and_keys(program, attention, _rotation(width, generator))
        return {}


PLANNED_TRANSFORMS: Mapping[str, Callable[..., Pass]] = MappingProxyType(
    {
        "duquant": PlanDuquant,
        "quip": PlanQuip,
        "resq": PlanResq,
        "rptq": PlanRptq,
        "spinquant": PlanSpinquant,
    }
)
"""For steps that choose values from data and leave more in the program than other weights."""


def _rotation(n: int, generator: torch.Generator) -> Orthogonal:
    return random_orthogonal(n, generator)


def _order(n: int, generator: torch.Generator) -> Permutation:
    return Permutation(torch.randperm(n, generator=generator))
