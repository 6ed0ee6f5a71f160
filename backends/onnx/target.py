"""The `onnx` target: standard operators only, for any run time and for NPU toolchains."""

from __future__ import annotations

from pathlib import Path

from qcompile.backends.base import Capabilities, Finding, Packed, Target
from qcompile.backends.onnx import fused, quantized
from qcompile.backends.onnx.dialect_cache import FORMATS as CACHE_FORMATS
from qcompile.backends.onnx.emitter import DEFAULT_OPSET, OnnxEmitter, OnnxGraph
from qcompile.backends.onnx.external_data import predict_sizes, write_model
from qcompile.backends.onnx.notes import notes_of
from qcompile.backends.onnx.signature import signature_of
from qcompile.errors import TargetError
from qcompile.formats.base import Format
from qcompile.formats.integer import IntegerFormat
from qcompile.formats.integer_scale import IntegerScaleFormat
from qcompile.formats.lookup import LookupFormat
from qcompile.formats.vector import VectorFormat
from qcompile.ir.program import Program
from qcompile.ir.types import Role
from qcompile.passes.infra import Context, PassManager, Phase
from qcompile.passes.lower.fix_sizes import FixSizes
from qcompile.passes.lower.split_linears import SplitLinears
from qcompile.passes.lower.store_caches import StoreCaches
from qcompile.passes.lower.turn_inputs import TurnInputs
from qcompile.passes.quantize.activation_formats import ACTIVATION_FORMATS
from qcompile.progress import Progress


class OnnxTarget(Target):
    """ONNX models without operators of anybody's own.

    Args:
        opset: Version of the standard operators. From 23 on, attention, RMS norms and rotary
            embeddings are one operator each.
        batch: Rows, where a toolchain asks for fixed shapes; by default 1 where `query` is fixed,
            and else open.
        query: New tokens of a row, likewise; with a cache, only together with `past`.
        past: Tokens of a row that the cache holds, likewise.

    Attributes:
        opset: The same.

    Raises:
        TargetError: If an option has a value that it cannot have.
    """

    name = "onnx"

    def __init__(
        self,
        opset: int = DEFAULT_OPSET,
        batch: int | None = None,
        query: int | None = None,
        past: int | None = None,
    ) -> None:
        self.opset = opset
        self._query = query
        newer = fused.TRANSLATIONS if opset >= fused.FIRST_OPSET else {}
        self._emitter = OnnxEmitter({**newer, **quantized.TRANSLATIONS}, opset=opset)
        rows = 1 if batch is None and query is not None else batch
        sizes = {"batch": rows, "query": query, "past": past}
        fixed = {name: size for name, size in sizes.items() if size is not None}
        self._fixed = frozenset(fixed)
        sized = (FixSizes(fixed),) if fixed else ()
        self._phase = Phase("lower", (SplitLinears(), TurnInputs(), *sized))

    @property
    def capabilities(self) -> Capabilities:
        """Integers of every width, tables of levels; activations of every format."""
        return Capabilities(
            weight_format=_weight_reason,
            embedding_format=_format_reason,
            activation_formats=frozenset(ACTIVATION_FORMATS),
            cache_formats=frozenset(CACHE_FORMATS),
            sparse_floats=True,
        )

    def check(self, program: Program) -> list[Finding]:
        """Calls that the standard operators cannot express."""
        return [
            Finding(failure.node, f"{failure.operator}: {failure.reason}")
            for failure in self._emitter.untranslatable(program)
        ]

    def lower(self, program: Program, context: Context) -> Program:
        """The quantized program, from which all translations start; its sizes fixed.

        Raises:
            TargetError: A size that is to be fixed does not vary, or not alone.
        """
        self._check_sizes(program)
        phases = [self._phase, Phase("store caches", (StoreCaches(),))]
        return PassManager(phases).run(program, context)[0]

    def _check_sizes(self, program: Program) -> None:
        """Refuses fixed sizes with which a text could not be read."""
        fixed = {"query", "past"} & self._fixed
        if not program.signature.is_causal_lm or not fixed:
            return
        if not program.signature.has(Role.PAST_KEY):
            raise TargetError(
                "the model keeps states only: they are of fixed size whatever query and past are, "
                "and tokens that fill up a fixed query would change them",
                remedy=f"leave out {' and '.join(sorted(fixed))}",
            )
        if len(fixed) == 1:
            (other,) = {"query", "past"} - fixed
            raise TargetError(
                f"a cache of fixed shape needs query and past: {other} is missing",
                remedy=f"add {other}=...",
            )
        if program.signature.has(Role.PAST_STATE) and self._query != 1:
            raise TargetError(
                "the model keeps states, which padding would change: it can only be compiled for "
                f"query=1, not {self._query}",
                remedy="use query=1",
            )

    def pack(self, program: Program, directory: Path, progress: Progress) -> Packed:
        """Writes ``model.onnx`` and its weights.

        Raises:
            ArtifactError: The files cannot be written.
        """
        graph = self._emit(program)
        progress.stage("write weights", len(graph.weights))
        stored = write_model(graph, program.weights, directory, progress=progress)
        notes = tuple(notes_of(graph, program))
        return Packed(signature_of(graph, program), tensor_bytes=stored, notes=notes)

    def predict_files(self, program: Program) -> dict[str, int]:
        """Exact sizes of ``model.onnx`` and its weights."""
        return predict_sizes(self._emit(program))

    def _emit(self, program: Program) -> OnnxGraph:
        return self._emitter.emit(program, name=program.provenance.name)


def _weight_reason(format: Format) -> str | None:
    return None if isinstance(format, VectorFormat) else _format_reason(format)


def _format_reason(format: Format) -> str | None:
    known = isinstance(format, (IntegerFormat, IntegerScaleFormat, LookupFormat))
    return None if known else f"standard ONNX has no {format}"
