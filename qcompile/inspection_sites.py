"""Sites of equivalent transforms as `inspect` tells of them: what repeats by layer stands once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import fx

from qcompile.analysis.families import Family
from qcompile.analysis.roles import DOWN_PROJ, NORMED, O_PROJ, linear_role
from qcompile.analysis.sites import Site, find_sites
from qcompile.folding import fold_names
from qcompile.inspection_records import SiteSummary
from qcompile.ir.program import Program

_PLACES: Mapping[str | None, str] = {
    DOWN_PROJ: "up / down",
    O_PROJ: "value / output",
    NORMED: "norm / linears",
}


def summarize_sites(program: Program) -> tuple[SiteSummary, ...]:
    """The sites of a raised program, in the order of the graph.

    Sites of equal shape whose weights have equal names but for numbers count as one.
    """
    roles = _roles(program)
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in find_sites(program):
        key = (
            _place(site, roles),
            _template(site.sources),
            _template(site.sinks),
            site.size,
            len(site.blocks),
            site.families,
            frozenset((b.family, b.reason) for b in site.blockers),
        )
        groups.setdefault(key, []).append(site)
    return tuple(_summary(str(key[0]), sites) for key, sites in groups.items())


def _summary(place: str, sites: list[Site]) -> SiteSummary:
    first = sites[0]
    rejected: dict[str, dict[str, list[str]]] = {}
    for site in sites:
        for blocker in site.blockers:
            if blocker.family not in site.families:
                by_reason = rejected.setdefault(blocker.family.value, {})
                by_reason.setdefault(blocker.reason, []).append(blocker.node)
    return SiteSummary(
        place=place,
        times=len(sites),
        sources=tuple(fold_names(name for site in sites for name in site.sources)),
        sinks=tuple(fold_names(name for site in sites for name in site.sinks)),
        gains=tuple(fold_names(name for site in sites for name in site.gains)),
        size=first.size,
        blocks=len(first.blocks),
        legal=tuple(family.value for family in Family if family in first.families),
        rejected={
            family: {reason: tuple(dict.fromkeys(nodes)) for reason, nodes in reasons.items()}
            for family, reasons in rejected.items()
        },
        needs_folded_norms=tuple(first.norms) != (),
        needs_centred_sources=first.centred,
    )


def _place(site: Site, roles: Mapping[str, str]) -> str:
    """What a site is, as people call it."""
    if site.reads_norm:
        return "residual stream"
    if not site.sinks:
        return "query / key"
    found = {roles.get(name, "other") for name in site.sinks}
    return found.pop() if len(found) == 1 else "other"


def _roles(program: Program) -> dict[str, str]:
    found = {}
    for linear in program.calls(torch.ops.aten.linear.default):
        weight = linear.args[1]
        if isinstance(weight, fx.Node):
            found[str(weight.target)] = _PLACES.get(linear_role(linear), "other")
    return found


def _template(names: Iterable[str]) -> tuple[str, ...]:
    """Names without their numbers, each once."""
    without = (
        ".".join("#" if part.isdecimal() else part for part in name.split(".")) for name in names
    )
    return tuple(sorted(set(without)))
