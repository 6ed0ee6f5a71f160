"""Axes cut into atoms, and atoms joined into bases, one union-find per family.

An *axis* is a feature dimension of some value, of a fixed size; several dimensions (heads and
their width) may make one axis. A *link* says that a stretch of one axis and a stretch of another
hold the same basis. Where a link begins or ends inside an axis, the axis is cut there, and a cut
travels along links. What is left uncut is an *atom*: the unit that a transform acts on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from qcompile.analysis.families import Blocker, Family, Port, PortRole

ALL_FAMILIES = frozenset(Family)

MATRICES = ALL_FAMILIES - {Family.SHIFT}
"""The families that are linear maps."""

_CONTRADICTIONS = {
    Family.DIAGONAL: "it would have to be scaled by s and by 1 / s",
    Family.SHIFT: "a weight that writes to it reads it as well",
}
"""Why a transform and its inverse may not be the same, where a basis asks for both."""


@dataclass(frozen=True)
class Link:
    """Two stretches in one basis.

    Attributes:
        a: An axis.
        a_start: Where its stretch begins.
        b: Another axis.
        b_start: Where its stretch begins.
        size: Length of both.
        families: For which the stretches transform together.
        dual: Whether one transforms by ``T`` when the other does by ``T^-T``.
    """

    a: int
    a_start: int
    b: int
    b_start: int
    size: int
    families: frozenset[Family]
    dual: bool = False


@dataclass(frozen=True)
class Atom:
    """An uncut stretch of an axis."""

    axis: int
    start: int
    size: int


@dataclass
class Basis:
    """Atoms that transform together.

    Attributes:
        size: Of each atom.
        ports: Weights on them.
        blockers: Why the family is not legal here; empty if it is.
        planes: Channels that a rotary embedding pairs, as ``(pairs, interleaved)``, if any: a
            diagonal must be equal on both.
        is_normed: Whether a normalization reads values on it.
    """

    size: int
    ports: set[Port]
    blockers: list[Blocker]
    planes: tuple[int, bool] | None = None
    is_normed: bool = False


class Axes:
    """Collects axes, links, ports and blockers, then says what the bases are."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._cuts: list[set[int]] = []
        self._links: list[Link] = []
        self._links_of: dict[int, list[Link]] = defaultdict(list)
        self._weights: dict[tuple[str, int], int] = {}
        self._ports: list[tuple[int, Port, frozenset[Family]]] = []
        self._blockers: list[tuple[int, Blocker]] = []
        self._planes: dict[int, tuple[int, bool]] = {}
        self._normed: set[int] = set()

    def new(self, size: int) -> int:
        """A new axis."""
        self.sizes.append(size)
        self._cuts.append({0, size})
        return len(self.sizes) - 1

    def link(
        self,
        a: int,
        b: int,
        families: Iterable[Family] = ALL_FAMILIES,
        *,
        a_start: int = 0,
        b_start: int = 0,
        size: int | None = None,
        dual: bool = False,
    ) -> None:
        """Joins two stretches (whole axes unless told otherwise)."""
        size = self.sizes[a] if size is None else size
        link = Link(a, a_start, b, b_start, size, frozenset(families), dual)
        self._links.append(link)
        self._links_of[a].append(link)
        self._links_of[b].append(link)
        self._cuts[a] |= {a_start, a_start + size}
        self._cuts[b] |= {b_start, b_start + size}

    def port(
        self,
        axis: int,
        weight: str,
        weight_axis: int,
        weight_size: int,
        role: PortRole,
        families: Iterable[Family] = ALL_FAMILIES,
        *,
        weight_start: int = 0,
    ) -> None:
        """Puts a stretch of a weight's axis on an axis.

        The weight's axis is an axis like any other, so a weight that is used twice joins the
        bases of both uses.
        """
        size = self.sizes[axis]
        key = (weight, weight_axis)
        if key not in self._weights:
            self._weights[key] = self.new(weight_size)
        own = self._weights[key]
        dual = role is PortRole.SINK
        self.link(axis, own, families, b_start=weight_start, size=size, dual=dual)
        port = Port(weight, weight_axis, weight_start, size, role)
        self._ports.append((own, port, frozenset(families)))

    def block(
        self, axis: int, node: str, reason: str, families: Iterable[Family] = ALL_FAMILIES
    ) -> None:
        """Says that an axis may not be transformed."""
        self._blockers += [(axis, Blocker(family, node, reason)) for family in families]

    def cut(self, axis: int, width: int) -> None:
        """Cuts an axis into stretches of a width (heads)."""
        self._cuts[axis] |= set(range(0, self.sizes[axis] + 1, width))

    def pair(self, axis: int, pairs: int, interleaved: bool) -> None:
        """Notes that a rotary embedding pairs the first channels of each atom."""
        self._planes[axis] = (pairs, interleaved)

    def normalize(self, axis: int) -> None:
        """Notes that a normalization reads the axis."""
        self._normed.add(axis)

    def bases(self, family: Family) -> list[Basis]:
        """The bases of one family: every class of joined atoms that has a port."""
        self._spread_cuts()
        ordered = [sorted(cuts) for cuts in self._cuts]
        union = _SignedUnion()
        for link in self._links:
            if family in link.families:
                for offset in self._starts(ordered, link.a, link.a_start, link.size):
                    first = (link.a, offset)
                    second = (link.b, offset - link.a_start + link.b_start)
                    union.join(first, second, link.dual)
        classes: dict[tuple[int, int], Basis] = {}
        for axis, port, families in self._ports:
            if family not in families:
                continue
            for offset, size in self._atoms(ordered, axis, port.start, port.size):
                root, dual = union.find((axis, offset))
                basis = classes.setdefault(root, Basis(size, set(), []))
                basis.ports.add(Port(port.weight, port.axis, offset, size, port.role, dual))
        for axis, blocker in self._blockers:
            if blocker.family is family:
                for offset in ordered[axis][:-1]:
                    found = classes.get(union.find((axis, offset))[0])
                    if found is not None and blocker not in found.blockers:
                        found.blockers.append(blocker)
        if family in _CONTRADICTIONS:
            for key in union.contradictions:
                found = classes.get(union.find(key)[0])
                if found is not None:
                    found.blockers.append(Blocker(family, "", _CONTRADICTIONS[family]))
        for axis, planes in self._planes.items():
            for offset in ordered[axis][:-1]:
                found = classes.get(union.find((axis, offset))[0])
                if found is not None:
                    found.planes = planes
        for axis in self._normed:
            for offset in ordered[axis][:-1]:
                found = classes.get(union.find((axis, offset))[0])
                if found is not None:
                    found.is_normed = True
        for basis in classes.values():
            basis.ports = _sources_upright(basis.ports)
        return list(classes.values())

    def _spread_cuts(self) -> None:
        pending = [(axis, cut) for axis, cuts in enumerate(self._cuts) for cut in cuts]
        while pending:
            axis, cut = pending.pop()
            for link in self._links_of[axis]:
                for here, here_start, there, there_start in (
                    (link.a, link.a_start, link.b, link.b_start),
                    (link.b, link.b_start, link.a, link.a_start),
                ):
                    inside = here == axis and 0 <= cut - here_start <= link.size
                    target = cut - here_start + there_start
                    if inside and target not in self._cuts[there]:
                        self._cuts[there].add(target)
                        pending.append((there, target))

    def _starts(self, ordered: list[list[int]], axis: int, start: int, size: int) -> list[int]:
        cuts = ordered[axis]
        return cuts[bisect_left(cuts, start) : bisect_left(cuts, start + size)]

    def _atoms(
        self, ordered: list[list[int]], axis: int, start: int, size: int
    ) -> Iterator[tuple[int, int]]:
        cuts = ordered[axis]
        for i in range(bisect_left(cuts, start), bisect_left(cuts, start + size)):
            yield cuts[i], cuts[i + 1] - cuts[i]


def _sources_upright(ports: set[Port]) -> set[Port]:
    """The same ports with signs such that the first source sees the transform itself."""
    sources = sorted((p.weight, p.start, p.dual) for p in ports if p.role is PortRole.SOURCE)
    if not sources or not sources[0][2]:
        return ports
    return {replace(port, dual=not port.dual) for port in ports}


Key = tuple[int, int]


class _SignedUnion:
    """Union-find whose edges carry a sign: whether two atoms see the same transform or its dual."""

    def __init__(self) -> None:
        self._parent: dict[Key, Key] = {}
        self._dual: dict[Key, bool] = {}
        self.contradictions: list[Key] = []
        """Atoms that would have to see a transform and its dual at once."""

    def find(self, key: Key) -> tuple[Key, bool]:
        """The root of a key's class, and whether the key is dual to it."""
        path, dual = [], False
        while key in self._parent:
            path.append((key, dual))
            dual ^= self._dual[key]
            key = self._parent[key]
        for node, before in path:
            self._parent[node] = key
            self._dual[node] = dual ^ before
        return key, dual

    def join(self, a: Key, b: Key, dual: bool) -> None:
        """Puts two keys into one class."""
        (root_a, dual_a), (root_b, dual_b) = self.find(a), self.find(b)
        if root_a != root_b:
            self._parent[root_b] = root_a
            self._dual[root_b] = dual_a ^ dual_b ^ dual
        elif dual_a ^ dual_b ^ dual:
            self.contradictions.append(a)
