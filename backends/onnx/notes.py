"""What a user may want to know of a written model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from qcompile.backends.onnx.emitter import OnnxGraph
from qcompile.backends.onnx.stored_levels import element_bits
from qcompile.folding import fold_names
from qcompile.formats import IntegerFormat, IntegerScaleFormat, LookupFormat, stored_weight
from qcompile.formats.base import Format
from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.kernels.lookup.levels import code_bits

_ROW_LABELS = (".codes", ".rows1", ".rows2", ".rows4")
"""Ends of the names of weights that are only looked up by rows."""


def notes_of(graph: OnnxGraph, program: Program) -> Iterator[str]:
    """Weights that take more room than their format says, one line per reason.

    Args:
        graph: What was emitted.
        program: What it was emitted from.
    """
    yield from _widened(graph, program)
    yield from _stored_twice(graph)


def _widened(graph: OnnxGraph, program: Program) -> Iterator[str]:
    multiplied = {
        weight.weight for name, weight in graph.weights.items() if not name.endswith(_ROW_LABELS)
    }
    names: dict[tuple[str, int], list[str]] = defaultdict(list)
    for node in program.calls(dialect.dequantize, dialect.lookup):
        weight = stored_weight(node)
        if weight is None or str(weight.tensors["codes"].target) not in multiplied:
            continue
        bits, container = _widths(weight.format)
        if bits != container:
            names[str(weight.format), container].append(weight.name)
    for (format, container), layers in names.items():
        yield (
            f"{', '.join(fold_names(layers))}: {format} stands in {container}-bit elements where "
            "it is multiplied, for lack of narrower ones in standard ONNX"
        )


def _widths(format: Format) -> tuple[int, int]:
    """Bits of a code, and of the element of a matrix that stands for it."""
    if isinstance(format, LookupFormat):
        return code_bits(format.table), element_bits(format.table)
    assert isinstance(format, IntegerFormat | IntegerScaleFormat)
    return format.bits, 4 if format.bits <= 4 else 8


def _stored_twice(graph: OnnxGraph) -> Iterator[str]:
    sizes: dict[str, list[int]] = defaultdict(list)
    for weight in graph.weights.values():
        if weight.weight.endswith(".codes"):
            sizes[weight.weight].append(weight.spec.bytes)
    for codes, copies in sizes.items():
        if len(copies) > 1:
            name = codes.removesuffix(".codes")
            yield (
                f"{name} is stored {len(copies)} times, {sum(copies):,} bytes of codes: as rows to "
                "look up and as columns to multiply with"
            )
