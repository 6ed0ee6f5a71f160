"""The directions of largest variance get more bits than the others: ResQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.analysis.families import Family, Port, PortRole
from qcompile.analysis.roles import linears_by_input, weight_name
from qcompile.analysis.sites import Site
from qcompile.calibration.requests import Request, Statistics
from qcompile.calibration.statistics import Hessian
from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult, Skip
from qcompile.passes.measure import measure
from qcompile.passes.quantize.layers import output_projection
from qcompile.passes.transform.absorb import absorb
from qcompile.passes.transform.insert import insert_before, rotate_queries_and_keys
from qcompile.passes.transform.rotate import rotation_sites
from qcompile.passes.transform.split_channels import split_channels
from qcompile.passes.transform.values import Orthogonal, Permutation, random_orthogonal

aten = torch.ops.aten

_DAMPING = 0.01
"""Of the mean variance, added to all channels."""


class Resq(Pass):
    """Turns the residual stream and the values of heads into a part to round and a part to keep.

    The basis of each site becomes that of its principal components: those of least variance first,
    rotated at random among themselves, then the others, rotated likewise. All of it goes into
    weights. Linears that read the basis become the sum of one over each part::

        linear(x, W, b)   =>   linear(x[:n - r], W_low) + linear(x[n - r:], W_high, b)

    so that weights named ``*.high`` and their inputs may have more bits than those named ``*.low``.
    Behind attention, where each head has both parts, a permutation that stays in the program puts
    the low parts of all heads first. The linear that makes the logits is not split.

    Keys behind their rotary embedding, and queries with them, can be turned into such a basis too,
    one for all heads of a layer, by nodes that stay. It pays where the cache gives groups of
    channels scales of their own.

    The result's details say ``place, weights, high, variance``: channels in the high part, and the
    fraction of the variance that lies there.

    Args:
        fraction: Of the channels of each basis that form the high part.
        multiple: High parts of the residual stream are multiples of this, for kernels' sake.
        query_key: Whether to turn queries and keys.
        seed: Added to the compilation's own, for the rotations of each part.

    Source: Saxena et al. 2024 (ResQ, arXiv 2412.14363).
    """

    requires = frozenset({Fact.GAINS_FOLDED})
    numerics = Equivalent()

    def __init__(
        self,
        fraction: float = 0.125,
        multiple: int = 8,
        query_key: bool = False,
        seed: int = 0,
    ) -> None:
        self._fraction = fraction
        self._multiple = multiple
        self._query_key = query_key
        self._seed = seed

    def run(self, program: Program, context: Context) -> PassResult:
        """Rotates every site, then splits the linears that read it.

        Raises:
            DataError: There is no calibration data, or it does not fit.
        """
        result = PassResult()
        linears = _linears_by_weight(program)
        bases = [
            basis
            for place, site in rotation_sites(program)
            if (basis := self._basis(place, site, linears, result)) is not None
        ]
        keys = {n: _new_keys(n) for n in program.calls(dialect.attention) if self._query_key}
        values = [*(value for basis in bases for value in basis.values), *keys.values()]
        requests = [Request(value, Hessian) for value in values]
        found = self._measure(program, requests, context)
        generator = torch.Generator().manual_seed(context.seed + self._seed)
        for basis in bases:
            result.details.append(self._rotate(program, basis, found, generator))
            result.rewrites += 1
        for basis in bases:
            _split(program, basis, result)
        for attention, key in keys.items():
            turned = self._rotate_keys(program, attention, key, found, generator)
            result.details.append(turned)
            result.rewrites += 1
        return result

    def _basis(
        self, place: str, site: Site, linears: Mapping[str, fx.Node], result: PassResult
    ) -> Basis | None:
        if Family.ORTHOGONAL not in site.families:
            reasons = [b.reason for b in site.blockers if b.family is Family.ORTHOGONAL]
            result.skips.append(Skip(site.sources[0], "; ".join(dict.fromkeys(reasons))))
            return None
        if site.reads_norm:
            read = [linears[name] for name in site.sinks if name in linears]
            values = dict.fromkeys(linear.args[0] for linear in read)
            covers = [[(v, 0) for v in values if isinstance(v, fx.Node)]]
            multiple = self._multiple
        else:
            covers = [_produced(block, linears) for block in site.blocks]
            multiple = 1
        if not all(covers):
            result.skips.append(Skip(site.sources[0], "no linear tells the variance of its basis"))
            return None
        high = self._high(site.size, multiple)
        if high >= site.size:
            result.skips.append(Skip(site.sources[0], f"{site.size} channels are too few to split"))
            return None
        return Basis(place, site, covers, high)

    def _high(self, size: int, multiple: int) -> int:
        return max(multiple, round(size * self._fraction / multiple) * multiple)

    def _measure(
        self, program: Program, requests: Sequence[Request], context: Context
    ) -> Statistics:
        return measure(program, requests, context, "ResQ")

    def _rotate(
        self, program: Program, basis: Basis, found: Statistics, generator: torch.Generator
    ) -> dict[str, object]:
        size, high = basis.site.size, basis.high
        rotations, fractions = [], []
        for cover in basis.covers if basis.per_block else basis.covers * len(basis.site.blocks):
            covariance = torch.zeros(size, size, dtype=torch.float64)
            for value, start in cover:
                stretch = slice(start, start + size)
                covariance += found.of(value, Hessian).matrix[stretch, stretch]
            rotation = principal_rotation(covariance, high, generator)
            rotations.append(Orthogonal(rotation))
            fractions.append(_variance_above(rotation, covariance, high))
        absorb(program, basis.site, rotations)
        return {
            "place": basis.place,
            "weights": [*basis.site.sources, *basis.site.sinks],
            "high": high,
            "variance": sum(fractions) / len(fractions),
        }

    def _rotate_keys(
        self,
        program: Program,
        attention: fx.Node,
        key: fx.Node,
        found: Statistics,
        generator: torch.Generator,
    ) -> dict[str, object]:
        covariance = found.of(key, Hessian).matrix
        high = self._high(len(covariance), 1)
        rotation = principal_rotation(covariance, high, generator)
        rotate_queries_and_keys(program, attention, Orthogonal(rotation))
        return {
            "place": "queries and keys",
            "weights": [],
            "high": high,
            "variance": _variance_above(rotation, covariance, high),
        }


@dataclass(frozen=True)
class Basis:
    """A site to rotate.

    Attributes:
        place: What reports call it.
        site: The site.
        covers: For each block (or once for all), the values that show its variance, each with the
            first channel of the block in it.
        high: Channels of the high part.
    """

    place: str
    site: Site
    covers: list[list[tuple[fx.Node, int]]]
    high: int

    @property
    def values(self) -> list[fx.Node]:
        """All values to look at."""
        return [value for cover in self.covers for value, _ in cover]

    @property
    def per_block(self) -> bool:
        """Whether blocks differ."""
        return len(self.covers) == len(self.site.blocks)


def principal_rotation(covariance: Tensor, high: int, generator: torch.Generator) -> Tensor:
    """Principal components as a basis, rotated at random within two subspaces.

    Args:
        covariance: ``[n, n]`` float64.
        high: How many components of largest variance come last, in a subspace of their own.
        generator: For the rotations.

    Returns:
        ``[n, n]`` float64, orthogonal.
    """
    n = len(covariance)
    damped = covariance + _DAMPING * covariance.diagonal().mean() * torch.eye(
        n, dtype=torch.float64
    )
    _, components = torch.linalg.eigh(damped)
    low = components[:, : n - high] @ random_orthogonal(n - high, generator).rotation
    return torch.cat((low, components[:, n - high :] @ _random(high, generator)), dim=1)


def _variance_above(rotation: Tensor, covariance: Tensor, high: int) -> float:
    """The fraction of the variance that lies in the last channels of a basis."""
    variances = (rotation.T @ covariance @ rotation).diagonal()
    return float(variances[-high:].sum() / variances.sum())


def _new_keys(attention: fx.Node) -> fx.Node:
    """The keys of an attention ``[B, heads, T, D]``, before they join a cache."""
    key = attention.args[1]
    assert isinstance(key, fx.Node)
    new = key.args[1] if key.target is dialect.kv_append else key
    assert isinstance(new, fx.Node)
    return new


def _random(n: int, generator: torch.Generator) -> Tensor:
    return random_orthogonal(n, generator).rotation


def _linears_by_weight(program: Program) -> dict[str, fx.Node]:
    return {
        weight_name(linear): linear
        for _, linears in linears_by_input(program)
        for linear in linears
    }


def _produced(block: Sequence[Port], linears: Mapping[str, fx.Node]) -> list[tuple[fx.Node, int]]:
    """The results of linears that are sources of a block, with the place of the block in them."""
    return [
        (linears[port.weight], port.start)
        for port in block
        if port.role is PortRole.SOURCE and port.axis == 0 and port.weight in linears
    ]


def _split(program: Program, basis: Basis, result: PassResult) -> None:
    """Splits the linears that read a basis."""
    head = output_projection(program)
    sinks = set(basis.site.sinks)
    starts = sorted(
        {(port.weight, port.start) for port in basis.site.ports if port.role is PortRole.SINK}
    )
    for x, readers in linears_by_input(program):
        read = [linear for linear in readers if _weight(linear) in sinks]
        if head in read:
            result.skips.append(Skip(_weight(head), "it makes the logits"))
            read.remove(head)
        if not read:
            continue
        heads = [start for weight, start in starts if weight == _weight(read[0])]
        order = _low_first(heads, basis.site.size, basis.high)
        width = int(x.meta["val"].shape[-1])
        if len(order) != width:
            result.skips.append(Skip(_weight(read[0]), "it reads other channels besides"))
            continue
        if not Permutation(order).is_identity:
            insert_before(program, read, Permutation(order))
        split_channels(program, read, width - basis.high * len(heads))


def _low_first(starts: Sequence[int], size: int, high: int) -> Tensor:
    """The channels of blocks, the low part of each block first."""
    low = [torch.arange(start, start + size - high) for start in starts]
    return torch.cat([*low, *(torch.arange(s + size - high, s + size) for s in starts)])


def _weight(linear: fx.Node | None) -> str:
    assert linear is not None
    return weight_name(linear)
