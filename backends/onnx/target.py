"""The `onnx` target: standard operators only, for any run time and for NPU toolchains."""

from __future__ import annotations

from pathlib import Path

from qcompile.backends.base import Capabilities, Finding, Packed, Target
from qcompile.backends.onnx import fused, quantized
from qcompile.backends.onnx.emitter import DEFAULT_OPSET, OnnxEmitter, OnnxGraph
from qcompile.backends.onnx.external_data import predict_sizes, write_model
from qcompile.backends.onnx.signature import signature_of
from qcompile.formats.base import Format
from qcompile.formats.integer import IntegerFormat
from qcompile.ir.program import Program
from qcompile.passes.infra import Context
from qcompile.progress import Progress


class OnnxTarget(Target):
    """ONNX models without operators of anybody's own.

    Args:
        opset: Version of the standard operators. From 23 on, attention, RMS norms and rotary
            embeddings are one operator each.

    Attributes:
        opset: The same.

    Raises:
        TargetError: If an option has a value that it cannot have.
    """

    name = "onnx"

    def __init__(self, opset: int = DEFAULT_OPSET) -> None:
        self.opset = opset
        newer = fused.TRANSLATIONS if opset >= fused.FIRST_OPSET else {}
        self._emitter = OnnxEmitter({**newer, **quantized.TRANSLATIONS}, opset=opset)

    @property
    def capabilities(self) -> Capabilities:
        """Integer weights of every width, the odd ones in wider elements; int8 activations."""
        return Capabilities(
            weight_format=_format_reason,
            embedding_format=_format_reason,
            activation_formats=frozenset({"int8"}),
        )

    def check(self, program: Program) -> list[Finding]:
        """Calls that the standard operators cannot express."""
        return [
            Finding(failure.node, f"{failure.operator}: {failure.reason}")
            for failure in self._emitter.untranslatable(program)
        ]

    def lower(self, program: Program, context: Context) -> Program:
        """The program as it is: every translation starts from the quantized program."""
        del context
        return program.copy()

    def pack(self, program: Program, directory: Path, progress: Progress) -> Packed:
        """Writes ``model.onnx`` and its weights.

        Raises:
            ArtifactError: The files cannot be written.
        """
        graph = self._emit(program)
        progress.stage("write weights", len(graph.weights))
        stored = write_model(graph, program.weights, directory, progress=progress)
        return Packed(signature_of(graph, program), tensor_bytes=stored)

    def predict_files(self, program: Program) -> dict[str, int]:
        """Exact sizes of ``model.onnx`` and its weights."""
        return predict_sizes(self._emit(program))

    def _emit(self, program: Program) -> OnnxGraph:
        return self._emitter.emit(program, name=program.provenance.name)


def _format_reason(format: Format) -> str | None:
    return None if isinstance(format, IntegerFormat) else f"standard ONNX has no {format}"
