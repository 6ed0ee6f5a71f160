"""What a user may want to know of a written model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from qcompile.backends.onnx.emitter import OnnxGraph
from qcompile.backends.onnx.stored import StoredCodes
from qcompile.folding import fold_names
from qcompile.ir import dialect
from qcompile.ir.program import Program


def notes_of(graph: OnnxGraph, program: Program) -> Iterator[str]:
    """Weights that take more room than their format says, one line per reason.

    Args:
        graph: What was emitted.
        program: What it was emitted from.
    """
    yield from _widened(graph, program)
    yield from _stored_twice(graph)


def _widened(graph: OnnxGraph, program: Program) -> Iterator[str]:
    written = {weight.weight for weight in graph.weights.values() if weight.arrange is not None}
    names: dict[tuple[int, int], list[str]] = defaultdict(list)
    for node in program.calls(dialect.dequantize):
        stored = StoredCodes.behind(node)
        if stored is not None and stored.bits != stored.container and stored.codes in written:
            names[stored.bits, stored.container].append(_layer(stored.codes))
    for (bits, container), layers in names.items():
        yield (
            f"{', '.join(fold_names(layers))}: codes of {bits} bits stand in {container}-bit "
            "elements where they are multiplied, for lack of narrower ones in standard ONNX"
        )


def _stored_twice(graph: OnnxGraph) -> Iterator[str]:
    sizes: dict[str, list[int]] = defaultdict(list)
    for weight in graph.weights.values():
        if weight.weight.endswith(".codes"):
            sizes[weight.weight].append(weight.spec.bytes)
    for name, copies in sizes.items():
        if len(copies) > 1:
            yield (
                f"{_layer(name)} is stored {len(copies)} times, {sum(copies):,} bytes of codes: as "
                "rows to look up and as columns to multiply with"
            )


def _layer(codes: str) -> str:
    return codes.removesuffix(".codes")
