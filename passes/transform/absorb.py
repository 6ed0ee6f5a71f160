"""A transform goes into the weights around its site, as a pending operator of each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qcompile.analysis.families import PortRole
from qcompile.analysis.sites import Site
from qcompile.ir.program import Program
from qcompile.passes.transform.cache_basis import change_cache_basis
from qcompile.passes.transform.shifts import absorb_shifts
from qcompile.passes.transform.values import Transform

Stretch = tuple[int, int, Transform]
"""Start and length on an axis, and what is applied there."""


def absorb(program: Program, site: Site, transforms: Sequence[Transform]) -> None:
    """Puts a transform after every source of a site and its inverse before every sink.

    The program computes what it computed; no node changes. Nothing is read: the transforms are
    pending on the weights and are applied in float64 when these are materialized.

    Args:
        program: Edited in place.
        site: One of `find_sites(program)`.
        transforms: One per block of the site, of a family that is legal there.

    Raises:
        ValueError: If number or size of the transforms do not fit the site, or some but not all of
            them are a `Shift`.
    """
    if len(transforms) != len(site.blocks):
        raise ValueError(f"{len(transforms)} transforms for {len(site.blocks)} blocks")
    for transform in transforms:
        if transform.size != site.size:
            raise ValueError(f"a transform of order {transform.size} on a site of {site.size}")
    if any(not transform.is_linear for transform in transforms):
        absorb_shifts(program, site, transforms)
        return
    stretches: dict[tuple[str, int], dict[int, Stretch]] = {}
    for block, transform in zip(site.blocks, transforms, strict=True):
        for port in block:
            applied = transform.dual() if port.dual else transform
            if port.role is PortRole.CACHE:
                change_cache_basis(program, port.weight, port.start, applied)
                continue
            along = stretches.setdefault((port.weight, port.axis), {})
            along[port.start] = (port.start, port.size, applied)
    for (weight, axis), along in stretches.items():
        _apply_later(program, weight, axis, list(along.values()))


def transform_weight(program: Program, weight: str, axis: int, transform: Transform) -> None:
    """Multiplies a weight's axis by a transform when the weight is materialized."""
    size = program.weights.spec(weight).shape[axis]
    _apply_later(program, weight, axis, [(0, size, transform)])


def _apply_later(program: Program, weight: str, axis: int, stretches: list[Stretch]) -> None:
    def function(value: Tensor) -> Tensor:
        value = value.clone()
        for start, size, transform in stretches:
            part = value.narrow(axis, start, size)
            part.copy_(transform.apply(part, axis))
        return value

    program.weights.derive(
        weight,
        (weight,),
        function,
        program.weights.spec(weight),
        exact=False,
        label="transform",
    )
