"""Inspections and verdicts as tables."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from qcompile.console import seconds_text, size_text
from qcompile.folding import fold_names
from qcompile.tables import Table

if TYPE_CHECKING:
    from qcompile.artifact_inspection import ArtifactInspection
    from qcompile.estimates import Estimate
    from qcompile.inspection_records import Inspection, PortSummary
    from qcompile.legality import LayerVerdict, Preflight
    from qcompile.manifest import ValueInfo

SECTIONS = ("summary", "ops", "stages", "barriers", "sites")
"""What `inspection_tables` can show, in this order."""


def inspection_tables(
    inspection: Inspection,
    sections: Collection[str] = SECTIONS,
    phases: Collection[str] = (),
) -> list[Table]:
    """The tables of a model.

    Args:
        inspection: What `inspect` found.
        sections: Which of `SECTIONS` to show.
        phases: The phases to count operators of; all by default.
    """
    makers = {
        "summary": lambda: [_summary(inspection), *_interface(inspection)],
        "ops": lambda: [_operators(inspection, phases)],
        "stages": lambda: [_stages(inspection)],
        "barriers": lambda: [_barriers(inspection)],
        "sites": lambda: _sites(inspection),
    }
    return [table for name in SECTIONS if name in sections for table in makers[name]()]


def artifact_tables(inspection: ArtifactInspection) -> list[Table]:
    """The tables of an artifact."""
    manifest = inspection.manifest
    rows = [
        ("model", manifest.model.name),
        ("architecture", manifest.model.architecture),
        ("target", manifest.target),
        ("task", manifest.task),
        ("recipe", str(manifest.recipe.get("name", "custom"))),
        ("qcompile version", manifest.qcompile_version),
        ("size", size_text(inspection.bytes)),
    ]
    rows += [
        (key.replace("_", " "), f"{value:.3f}")
        for key, value in manifest.bits.items()
        if isinstance(value, float)
    ]
    files = tuple((name, size_text(file.bytes)) for name, file in manifest.files.items())
    ports = _value_rows(manifest.signature.inputs), _value_rows(manifest.signature.outputs)
    return [
        Table("artifact", (), tuple(rows)),
        Table("inputs", _PORT_HEADER, ports[0]),
        Table("outputs", _PORT_HEADER, ports[1]),
        Table("files", ("name", "size"), files, right=frozenset({1})),
    ]


def preflight_tables(preflight: Preflight) -> list[Table]:
    """The tables of a verdict."""
    verdict = "legal" if preflight.legal else "not legal"
    tables = [
        Table(
            "verdict",
            (),
            (
                ("model", preflight.model),
                ("recipe", preflight.recipe),
                ("target", preflight.target),
                ("verdict", verdict),
            ),
        ),
        Table(
            "layers",
            ("layer", "part", "shape", "weight", "inputs", "bits", "verdict"),
            tuple(_layer_rows(preflight)),
            right=frozenset({5}),
        ),
    ]
    if preflight.findings:
        rows = _fold_rows((f.layer, f.reason, f.remedy or "") for f in preflight.findings)
        tables.append(Table("what stands in the way", ("layer", "reason", "remedy"), rows))
    remarks = [("warning", text) for text in preflight.warnings]
    remarks += [("note", text) for text in preflight.notes]
    if remarks:
        tables.append(Table("remarks", (), tuple(remarks)))
    if preflight.estimate is not None:
        tables.append(_estimate(preflight.estimate))
    return tables


def count_text(count: float) -> str:
    """A number for people: ``134.5 M``, in powers of 1000."""
    for unit in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} T"


# --- Models ----------------------------------------------------------------------------------


def _summary(inspection: Inspection) -> Table:
    rows = [
        ("name", inspection.model),
        ("architecture", inspection.architecture),
        ("source", inspection.source),
        ("parameters", count_text(inspection.parameters)),
        ("repeated blocks", str(inspection.blocks)),
    ]
    if inspection.recipe is not None:
        rows += [("recipe", inspection.recipe), ("target", inspection.target or "")]
    rows.append(("weights stored", size_text(inspection.weight_bytes)))
    for name, cost in inspection.totals.items():
        sizes = inspection.workloads[name]
        text = f"batch {sizes.batch}, query {sizes.query}, past {sizes.past}: "
        text += f"{count_text(cost.flops)} operations, "
        text += f"{size_text(cost.activation_bytes)} activations"
        if cost.cache_bytes:
            text += f", {size_text(cost.cache_bytes)} cache"
        rows.append((name, text))
    rows += [("note", note) for note in inspection.notes]
    return Table("model", (), tuple((key, value) for key, value in rows if value))


_PORT_HEADER = ("name", "role", "type")


def _interface(inspection: Inspection) -> Iterator[Table]:
    yield Table("inputs", _PORT_HEADER, _port_rows(inspection.inputs))
    yield Table("outputs", _PORT_HEADER, _port_rows(inspection.outputs))


def _value_rows(values: tuple[ValueInfo, ...]) -> tuple[tuple[str, ...], ...]:
    return _fold_rows([(v.name, v.role, _type_text(v.dtype, v.shape)) for v in values])


def _port_rows(ports: tuple[PortSummary, ...]) -> tuple[tuple[str, ...], ...]:
    return _fold_rows([(p.name, p.role, _type_text(p.dtype, p.shape)) for p in ports])


def _type_text(dtype: str, shape: tuple[int | str, ...]) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _fold_rows(rows: Iterable[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Rows that differ in numbers of their name only, as one."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, *rest in rows:
        groups.setdefault((_NUMBER.sub("#", name), *rest), []).append(name)
    return tuple((name, *key[1:]) for key, names in groups.items() for name in fold_names(names))


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a dotted name that is a number."""


def _operators(inspection: Inspection, phases: Collection[str]) -> Table:
    shown = [phase for phase in inspection.phases if not phases or phase.name in phases]
    names = sorted({name for phase in shown for name in phase.operators})
    rows = [(n, *(str(phase.operators.get(n, "-")) for phase in shown)) for n in names]
    rows.append(("all", *(str(sum(phase.operators.values())) for phase in shown)))
    header = ("operator", *(phase.name for phase in shown))
    right = frozenset(range(1, len(header)))
    return Table("operators after each phase", header, tuple(rows), right)


def _stages(inspection: Inspection) -> Table:
    workloads = list(inspection.workloads)
    header = ["stage", "times", "weights", "stored"]
    for name in workloads:
        header += [f"{name} ops", f"{name} act.", f"{name} cache"]
    rows = []
    for stage in inspection.stages:
        row = [
            stage.name,
            f"{len(stage.stages)} x",
            count_text(stage.weights),
            size_text(stage.weight_bytes),
        ]
        for name in workloads:
            cost = stage.costs[name]
            row += [
                count_text(cost.flops),
                *map(size_text, (cost.activation_bytes, cost.cache_bytes)),
            ]
        rows.append(tuple(row))
    title = "stages: memory and operations of each"
    return Table(title, tuple(header), tuple(rows), frozenset(range(1, len(header))))


def _barriers(inspection: Inspection) -> Table:
    groups: dict[tuple[str, str], list[str]] = {}
    for barrier in inspection.barriers:
        groups.setdefault((barrier.operator, barrier.reason), []).append(
            f"{barrier.stage}: {barrier.node}"
        )
    rows = tuple(
        (operator, f"{len(places)} x", places[0], reason)
        for (operator, reason), places in groups.items()
    )
    if not rows:
        return Table("barriers: none", (), ())
    return Table("barriers", ("operator", "times", "first", "reason"), rows, frozenset({1}))


# --- Sites ---------------------------------------------------------------------------------------


def _sites(inspection: Inspection) -> list[Table]:
    """The sites that were asked for, and why families of transforms are not legal there."""
    if inspection.sites is None:
        return []
    rows = tuple(
        (
            site.place,
            f"{site.times} x",
            f"{site.blocks} x {site.size}" if site.blocks > 1 else str(site.size),
            _weights(site.sources),
            _weights(site.sinks) or "-",
            ", ".join(site.legal) or "none",
        )
        for site in inspection.sites
    )
    reasons = tuple(
        (site.place, family, reason, nodes[0])
        for site in inspection.sites
        for family, by_reason in site.rejected.items()
        for reason, nodes in by_reason.items()
    )
    header = ("site", "times", "channels", "written by", "read by", "legal")
    found = Table("sites of equivalent transforms", header, rows, frozenset({1, 2}))
    if not reasons:
        return [found]
    reasons = tuple(dict.fromkeys(reasons))
    return [found, Table("not legal", ("site", "transform", "reason", "first node"), reasons)]


def _weights(names: Iterable[str]) -> str:
    return ", ".join(name.removesuffix(".weight") for name in names)


# --- Verdicts --------------------------------------------------------------------------------


def _layer_rows(preflight: Preflight) -> Iterator[tuple[str, ...]]:
    rows = [(layer.name, *_layer_cells(layer)) for layer in preflight.layers]
    yield from _fold_rows(rows)


def _layer_cells(layer: LayerVerdict) -> tuple[str, ...]:
    verdict = "ok" if layer.legal else "REFUSED"
    if layer.legal and layer.reason:
        verdict = f"float: {layer.reason}"
    shape = " x ".join(map(str, layer.shape))
    parts = ", ".join(layer.parts) or "-"
    bits = f"{layer.bits_per_weight:.3f}"
    return parts, shape, layer.format, layer.activations, bits, verdict


def _estimate(estimate: Estimate) -> Table:
    size = size_text(estimate.artifact_bytes)
    return Table(
        "prediction",
        (),
        (
            ("artifact", f"{size} (exact)" if estimate.exact else f"about {size} (weights' bits)"),
            ("peak memory", f"about {size_text(estimate.peak_memory_bytes)} (estimate)"),
            ("time to compile", f"about {seconds_text(round(estimate.total_seconds))} (estimate)"),
        ),
    )
