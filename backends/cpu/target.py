"""The CPU target: an ONNX graph over the operators of `kernels/cpu`."""

from __future__ import annotations

from pathlib import Path

from qcompile.backends.base import Capabilities, Finding, Packed, Target
from qcompile.backends.cpu.activations import WIDTHS
from qcompile.backends.cpu.finite import refuse_non_finite
from qcompile.backends.cpu.lower import lower_phase, store_phase
from qcompile.backends.cpu.packable import unmultipliable_reason, unpackable_reason
from qcompile.backends.cpu.translations import TRANSLATIONS
from qcompile.backends.onnx.emitter import OnnxEmitter, OnnxGraph
from qcompile.backends.onnx.external_data import predict_sizes, write_model
from qcompile.backends.onnx.signature import signature_of
from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.ir.types import Role
from qcompile.kernels.cpu.layout import KERNEL_LAYOUT_VERSION
from qcompile.kernels.kv_append.rows import CACHE_FORMATS
from qcompile.passes.infra import Context, PassManager
from qcompile.passes.quantize.activation_formats import FLOATS
from qcompile.progress import Progress

CAPACITY = "capacity"
"""Name of the cache axis in the artifact: the runtime's buffers are longer than what they hold."""

_CACHE_ROLES = (Role.PAST_KEY, Role.PAST_VALUE, Role.PRESENT_KEY, Role.PRESENT_VALUE)


_INTEGERS = [f"int{bits}{zero_points}" for bits in WIDTHS for zero_points in ("", "-asym")]
_ACTIVATIONS = frozenset({*_INTEGERS, *map(str, FLOATS)})


class CpuTarget(Target):
    """Any x86-64 or aarch64 machine that ONNX Runtime runs on."""

    name = "cpu"

    @property
    def capabilities(self) -> Capabilities:
        """What the kernels read; activations of integers and floats of any width."""
        return Capabilities(
            weight_format=unmultipliable_reason,
            embedding_format=unpackable_reason,
            activation_formats=_ACTIVATIONS,
            cache_formats=frozenset(CACHE_FORMATS),
            sparse_floats=True,
        )

    def check(self, program: Program) -> list[Finding]:
        """Calls that neither the library nor the standard operators can express."""
        return [
            Finding(failure.node, f"{failure.operator}: {failure.reason}")
            for failure in OnnxEmitter(TRANSLATIONS).untranslatable(program)
        ]

    def lower(self, program: Program, context: Context) -> Program:
        """One node per kernel."""
        return PassManager([lower_phase(), store_phase()]).run(program, context)[0]

    def pack(self, program: Program, directory: Path, progress: Progress) -> Packed:
        """Writes ``model.onnx`` and its memory-mapped weights.

        Raises:
            ModelError: A weight that stayed float has entries that are not finite.
            ArtifactError: The files cannot be written.
        """
        refuse_non_finite(program)
        graph = _emit(program)
        progress.stage("write weights", len(graph.weights))
        stored = write_model(graph, program.weights, directory, progress=progress)
        return Packed(signature_of(graph, program), KERNEL_LAYOUT_VERSION, stored)

    def predict_files(self, program: Program) -> dict[str, int]:
        """Exact sizes of ``model.onnx`` and its weights."""
        return predict_sizes(_emit(program))


def _emit(program: Program) -> OnnxGraph:
    graph = OnnxEmitter(TRANSLATIONS).emit(program, name=program.provenance.name)
    _rename_capacity(graph, program)
    return graph


def _rename_capacity(graph: OnnxGraph, program: Program) -> None:
    """The axis of caches that grow in place is the capacity, for inputs and outputs the same."""
    if any(True for _ in program.calls(dialect.kv_append)):
        return
    for values, ports in (
        (graph.model.graph.inputs, program.signature.inputs),
        (graph.model.graph.outputs, program.signature.outputs),
    ):
        for value, port in zip(values, ports, strict=True):
            if port.role in _CACHE_ROLES and value.shape is not None:
                value.shape[2] = CAPACITY
