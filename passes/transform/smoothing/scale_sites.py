"""Sites that take scales, seen from the layers that read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.analysis.families import Family, PortRole
from qcompile.analysis.roles import linear_role, linears_by_input, weight_name
from qcompile.analysis.sites import Site, find_sites
from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.passes.infra import Skip
from qcompile.passes.quantize.layers import output_projection

aten = torch.ops.aten


@dataclass(frozen=True)
class Reader:
    """A weight whose input channels lie on a site.

    Attributes:
        weight: Its name.
        value: What is multiplied with it, ``[..., K]``.
        stretches: Block and first channel of each stretch of the site on its input axis.
        roles: What stands in front of the linears over it; see `linear_role`.
    """

    weight: str
    value: fx.Node
    stretches: tuple[tuple[int, int], ...]
    roles: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ScaleSite:
    """A site whose channels can be divided by scales.

    Attributes:
        site: The site.
        readers: All weights that read it.
    """

    site: Site
    readers: tuple[Reader, ...]

    def by_block(self, reader: Reader, per_channel: Tensor) -> list[tuple[int, Tensor]]:
        """A statistic of a reader's channels ``[K]`` in stretches, with the block of each."""
        size = self.site.size
        return [(block, per_channel[start : start + size]) for block, start in reader.stretches]

    def spread(self, reader: Reader, scales: Sequence[Tensor]) -> Tensor:
        """The scale of each channel that a reader sees, ``[K]``; 1 where the site does not reach.

        Args:
            reader: One of `readers`.
            scales: ``[size]`` for each block.
        """
        full = torch.ones(int(reader.value.meta["val"].shape[-1]), dtype=scales[0].dtype)
        for block, start in reader.stretches:
            full[start : start + self.site.size] = scales[block]
        return full


def find_shift_sites(program: Program) -> Iterator[ScaleSite]:
    """Sites that layers read and that may be shifted, in the order of the graph."""
    layers = _layers(program)
    for site in find_sites(program):
        if Family.SHIFT in site.families and site.sinks:
            readers = [_reader(site, name, layers.get(name, [])) for name in site.sinks]
            if None not in readers:
                yield ScaleSite(site, tuple(r for r in readers if r is not None))


def find_scale_sites(program: Program) -> Iterator[ScaleSite | Skip]:
    """Sites that layers read and that may be scaled, in the order of the graph.

    Sites that may not be scaled, or whose readers' inputs cannot be seen, come as skips. The linear
    that makes the logits is left alone.
    """
    layers = _layers(program)
    head = output_projection(program)
    considered: set[str] = set()
    for site in find_sites(program):
        reasons = [b.reason for b in site.blockers if b.family is Family.DIAGONAL]
        if Family.DIAGONAL not in site.families:
            if reasons and not site.reads_norm and site.sinks:
                considered |= set(site.sinks)
                yield Skip(site.sinks[0], "; ".join(dict.fromkeys(reasons)))
            continue
        if not site.sinks:
            continue  # queries against keys: no layer reads them
        considered |= set(site.sinks)
        if any(head in layers.get(name, ()) for name in site.sinks):
            yield Skip(site.sinks[0], "it makes the logits")
            continue
        readers = [_reader(site, name, layers.get(name, [])) for name in site.sinks]
        found = [reader for reader in readers if reader is not None]
        if len(found) < len(readers):
            yield Skip(site.sinks[0], "no layer's input shows what it reads")
        else:
            yield ScaleSite(site, tuple(found))
    for _, linears in linears_by_input(program):
        name = weight_name(linears[0])
        if name not in considered:
            yield Skip(name, "no weight in front of it absorbs a scale")


def _reader(site: Site, name: str, layers: list[fx.Node]) -> Reader | None:
    values = {layer.args[0] for layer in layers}
    stretches = tuple(
        (block, port.start)
        for block, ports in enumerate(site.blocks)
        for port in ports
        if port.weight == name and port.role is PortRole.SINK
    )
    value = next(iter(values), None)
    if len(values) != 1 or not isinstance(value, fx.Node):
        return None
    roles = {linear_role(layer) for layer in layers if layer.target is aten.linear.default}
    return Reader(name, value, stretches, frozenset(role for role in roles if role is not None))


def _layers(program: Program) -> dict[str, list[fx.Node]]:
    """For each weight, the linears and experts that multiply their input with it."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.calls(aten.linear.default, dialect.experts):
        weight = node.args[3 if node.target is dialect.experts else 1]
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            found.setdefault(str(weight.target), []).append(node)
    return found
