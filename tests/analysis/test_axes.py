from __future__ import annotations

import itertools

from qcompile.analysis.axes import Axes, Basis
from qcompile.analysis.families import Family, PortRole

P, D, R = Family.PERMUTATION, Family.DIAGONAL, Family.ORTHOGONAL
SOURCE, SINK = PortRole.SOURCE, PortRole.SINK


def only(bases: list[Basis]) -> Basis:
    (basis,) = bases
    return basis


def shown(basis: Basis) -> list[tuple[str, int, int, bool]]:
    return sorted((p.weight, p.start, p.size, p.dual) for p in basis.ports)


def test_linked_axes_share_a_basis_and_sinks_see_the_dual() -> None:
    axes = Axes()
    a, b = axes.new(4), axes.new(4)
    axes.link(a, b)
    axes.port(a, "w", 0, 4, SOURCE)
    axes.port(b, "v", 1, 4, SINK)
    assert shown(only(axes.bases(R))) == [("v", 0, 4, True), ("w", 0, 4, False)]


def test_links_hold_for_their_families_only() -> None:
    axes = Axes()
    a, b = axes.new(4), axes.new(4)
    axes.link(a, b, {P})
    axes.port(a, "w", 0, 4, SOURCE)
    axes.port(b, "v", 1, 4, SINK)
    assert len(axes.bases(P)) == 1
    assert len(axes.bases(D)) == 2


def test_a_cut_travels_along_links_into_weights() -> None:
    axes = Axes()
    a, b = axes.new(6), axes.new(6)
    axes.link(a, b)
    axes.cut(b, 3)
    axes.port(a, "w", 0, 6, SOURCE)
    assert [shown(basis) for basis in axes.bases(R)] == [
        [("w", 0, 3, False)],
        [("w", 3, 3, False)],
    ]


def test_parts_of_a_fused_projection_are_bases_of_their_own() -> None:
    axes = Axes()
    fused, first, second = axes.new(5), axes.new(2), axes.new(3)
    axes.port(fused, "qkv", 0, 5, SOURCE)
    axes.link(fused, first, size=2)
    axes.link(fused, second, a_start=2, size=3)
    axes.port(second, "o", 1, 3, SINK)
    assert shown(axes.bases(R)[0]) == [("qkv", 0, 2, False)]
    assert shown(axes.bases(R)[1]) == [("o", 0, 3, True), ("qkv", 2, 3, False)]


def test_a_dual_link_turns_the_sign() -> None:
    axes = Axes()
    query, key = axes.new(4), axes.new(4)
    axes.port(query, "q", 0, 4, SOURCE)
    axes.port(key, "k", 0, 4, SOURCE)
    axes.link(key, query, dual=True)
    assert shown(only(axes.bases(D))) == [("k", 0, 4, False), ("q", 0, 4, True)]


def test_a_weight_used_twice_joins_both_bases() -> None:
    axes = Axes()
    a, b = axes.new(4), axes.new(4)
    axes.port(a, "tied", 1, 4, SOURCE)
    axes.port(b, "tied", 1, 4, SINK)
    axes.block(b, "norm", "for a reason", {P})
    assert [blocker.reason for blocker in only(axes.bases(P)).blockers] == ["for a reason"]


def test_a_scale_that_contradicts_itself_is_blocked_and_a_rotation_is_not() -> None:
    axes = Axes()
    a = axes.new(4)
    axes.port(a, "tied", 1, 4, SOURCE)
    axes.port(a, "tied", 1, 4, SINK)
    assert only(axes.bases(R)).blockers == []
    assert "by s and by 1 / s" in only(axes.bases(D)).blockers[0].reason


def test_a_blocker_stops_one_head_only_where_the_link_is() -> None:
    axes = Axes()
    whole, part = axes.new(6), axes.new(3)
    axes.port(whole, "w", 0, 6, SOURCE)
    axes.link(whole, part, a_start=3, size=3)
    axes.block(part, "rope", "mixes pairs", {R})
    free, blocked = axes.bases(R)
    assert (len(free.blockers), len(blocked.blockers)) == (0, 1)


def test_chains_of_any_length_are_one_basis() -> None:
    axes = Axes()
    chain = [axes.new(2) for _ in range(200)]
    for a, b in itertools.pairwise(chain):
        axes.link(b, a, dual=True)
    axes.port(chain[0], "first", 0, 2, SOURCE)
    axes.port(chain[-1], "last", 0, 2, SOURCE)
    assert shown(only(axes.bases(D))) == [("first", 0, 2, False), ("last", 0, 2, True)]
