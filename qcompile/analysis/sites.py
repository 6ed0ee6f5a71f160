"""Sites: the bases of a program that a transform may change, with everything that it touches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from qcompile.analysis.axes import Basis
from qcompile.analysis.basis import map_bases
from qcompile.analysis.declarations.norms import gain_consumers
from qcompile.analysis.families import Blocker, Family, Port, PortRole
from qcompile.analysis.features import BasisMap
from qcompile.ir import dialect
from qcompile.ir.program import Program


@dataclass(frozen=True)
class Site:
    """A place for an equivalent transform.

    A transform ``T`` of size `size` may be put after every source and its inverse before every
    sink, once per block; blocks (heads) are independent of each other.

    Attributes:
        size: Order of the transform of one block.
        blocks: The ports of each block.
        families: Families that are legal here.
        blockers: For families that are not, why.
        planes: ``(pairs, interleaved)`` if a rotary embedding pairs channels: a diagonal must be
            equal on both of a pair.
        norms: Names of normalizations whose gain must be folded into their consumers before an
            orthogonal transform.
        centred: Whether some of these subtract the mean, so that the sources must be centred.
        reads_norm: Whether a normalization reads values on this basis: it is a residual stream.
    """

    size: int
    blocks: tuple[tuple[Port, ...], ...]
    families: frozenset[Family]
    blockers: tuple[Blocker, ...]
    planes: tuple[int, bool] | None = None
    norms: tuple[str, ...] = ()
    centred: bool = False
    reads_norm: bool = False

    @property
    def ports(self) -> list[Port]:
        """The ports of all blocks."""
        return [port for block in self.blocks for port in block]

    @property
    def sources(self) -> list[str]:
        """Weights that produce values on this basis."""
        return _names(self.ports, PortRole.SOURCE)

    @property
    def sinks(self) -> list[str]:
        """Weights that consume values on this basis."""
        return _names(self.ports, PortRole.SINK)

    @property
    def gains(self) -> list[str]:
        """Elementwise gains that move along."""
        return _names(self.ports, PortRole.GAIN)

    def __str__(self) -> str:
        kinds = ", ".join(sorted(family.value for family in self.families)) or "rejected"
        blocks = f"{len(self.blocks)} x " if len(self.blocks) > 1 else ""
        ends = (
            f"{_shown(self.sources)} -> {_shown(self.sinks)}"
            if self.sinks
            else " = ".join(self.sources)
        )
        return f"{ends} [{blocks}{self.size}]: {kinds}"


def find_sites(program: Program) -> list[Site]:
    """Every basis with a source and a sink, in the order of the graph.

    Args:
        program: In raised form, its weights not quantized.

    Returns:
        Legal sites and rejected ones; a rejected family says why in `blockers`.
    """
    bases = map_bases(program)
    order = {str(node.target): i for i, node in enumerate(program.parameters())}
    found: dict[tuple[Port, ...], dict[Family, Basis]] = {}
    places: dict[tuple[Family, _Place], Basis] = {}
    for family in Family:
        for basis in bases.axes.bases(family):
            if _is_closed(basis):
                key = tuple(sorted(basis.ports, key=_order))
                found.setdefault(key, {})[family] = basis
            places |= {(family, _place(port)): basis for port in basis.ports}
    norms = _norms_by_weight(bases)
    merged: dict[tuple[object, ...], list[tuple[tuple[Port, ...], dict[Family, Basis]]]] = {}
    for key, by_family in found.items():
        merged.setdefault(_pattern(key, by_family), []).append((key, by_family))
    sites = [_site(blocks, norms, places) for blocks in merged.values()]
    return sorted(
        sites, key=lambda site: min(order.get(port.weight, len(order)) for port in site.ports)
    )


def _is_closed(basis: Basis) -> bool:
    """Whether something undoes what the sources do: a sink, or a source that sees the dual."""
    roles = {port.role for port in basis.ports}
    signs = {port.dual for port in basis.ports}
    return PortRole.SOURCE in roles and (PortRole.SINK in roles or len(signs) == 2)


def _order(port: Port) -> tuple[str, int, int, str]:
    return (port.weight, port.axis, port.start, port.role.value)


def _pattern(key: tuple[Port, ...], by_family: dict[Family, Basis]) -> tuple[object, ...]:
    """What two blocks of one site have in common."""
    ports = {(port.weight, port.axis, port.role, port.size) for port in key}
    return (frozenset(ports), frozenset(by_family))


_Place = tuple[str, int, int]
"""A stretch of a weight's axis: the weight, the axis, where it starts."""


def _place(port: Port) -> _Place:
    return (port.weight, port.axis, port.start)


def _open_blockers(
    key: tuple[Port, ...], family: Family, places: Mapping[tuple[Family, _Place], Basis]
) -> list[Blocker]:
    """Why a family leads from no source of a site to any sink, if that is so."""
    met = [(p, places[family, _place(p)]) for p in key if (family, _place(p)) in places]
    if any(port.role is PortRole.SOURCE and _is_closed(basis) for port, basis in met):
        return []
    ends = [basis for _, basis in met if not _is_closed(basis)]
    return list(dict.fromkeys(blocker for basis in ends for blocker in basis.blockers))


def _site(
    blocks: list[tuple[tuple[Port, ...], dict[Family, Basis]]],
    norms: dict[str, tuple[str, bool]],
    places: Mapping[tuple[Family, _Place], Basis],
) -> Site:
    blockers: list[Blocker] = []
    legal = set(Family)
    planes = None
    for key, by_family in blocks:
        legal &= {family for family, basis in by_family.items() if not basis.blockers}
        for basis in by_family.values():
            blockers += [blocker for blocker in basis.blockers if blocker not in blockers]
            planes = planes or basis.planes
        for family in (family for family in Family if family not in by_family):
            blockers += [b for b in _open_blockers(key, family, places) if b not in blockers]
    names = {port.weight for key, _ in blocks for port in key if port.role is PortRole.SINK}
    met = sorted({norms[name] for name in names if name in norms})
    needed = met if Family.ORTHOGONAL in legal else []
    return Site(
        size=blocks[0][0][0].size,
        blocks=tuple(key for key, _ in blocks),
        families=frozenset(legal),
        blockers=tuple(blockers),
        planes=planes,
        norms=tuple(name for name, _ in needed),
        centred=any(centred for _, centred in needed),
        reads_norm=any(basis.is_normed for _, bases in blocks for basis in bases.values()),
    )


def _norms_by_weight(bases: BasisMap) -> dict[str, tuple[str, bool]]:
    """For each weight that consumes a norm directly, that norm."""
    found: dict[str, tuple[str, bool]] = {}
    for norm in bases.norms:
        for weight in _consumers(norm.node):
            found[weight] = (norm.node.name, norm.centred)
    return found


def _consumers(node: fx.Node) -> Iterable[str]:
    for user in gain_consumers(node)[0]:
        weight = user.args[3] if user.target is dialect.experts else user.args[1]
        yield str(getattr(weight, "target", ""))


def _names(ports: Iterable[Port], role: PortRole) -> list[str]:
    return list(dict.fromkeys(port.weight for port in ports if port.role is role))


def _shown(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
