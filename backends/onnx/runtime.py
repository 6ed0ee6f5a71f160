"""Runs ONNX models with ONNX Runtime on the CPU; needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime

from qcompile.backends.decoding import Decoder, GrowingDecoder, RecomputingDecoder
from qcompile.backends.onnx.fixed_decoding import FixedDecoder, is_fixed
from qcompile.backends.onnx.run_errors import ORT_ERRORS, naming_failures
from qcompile.backends.session import ModelSession
from qcompile.errors import ArtifactError, QCompileError, RecipeError
from qcompile.manifest import Manifest, Signature, ValueInfo

MODEL_NAME = "model.onnx"

_ERRORS_ONLY = 3  # ONNX Runtime's warnings speak of graphs, not of what the user did
_ORT_DTYPES = {"float": "float32", "double": "float64"}


class OnnxSession(ModelSession):
    """A loaded model of standard operators.

    Args:
        directory: The artifact.
        manifest: Its manifest.
        threads: Threads that share the work of a node; by default one per physical core that
            this process may use.

    Raises:
        ArtifactError: If ONNX Runtime cannot load the model, or it is not what the manifest says.
        RecipeError: If `threads` is less than 1.
    """

    input_errors = ORT_ERRORS

    def __init__(self, directory: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise RecipeError(f"threads is {threads}", remedy="it must be 1 or more, or None")
        super().__init__(manifest)
        path = directory / MODEL_NAME
        if manifest.task == "causal_lm":
            _check_language_model(path, manifest)
        self._runtime = self._open(path, threads or _physical_cores())
        _check_values(path, self._signature.inputs, self._runtime.get_inputs())
        _check_values(
            path,
            self._signature.outputs,
            self._runtime.get_outputs(),
            may_be_narrower=True,
        )

    def _options(self) -> onnxruntime.SessionOptions:
        """How the model is run; a target with operators of its own registers them here."""
        options = onnxruntime.SessionOptions()
        # By default ONNX Runtime rounds what it multiplies with fused low-bit weights to int8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        return options

    def _open(self, path: Path, threads: int) -> onnxruntime.InferenceSession:
        try:
            options = self._options()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            options.log_severity_level = _ERRORS_ONLY
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except ORT_ERRORS as error:
            raise ArtifactError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}",
                remedy="upgrade onnxruntime, or compile the model again",
            ) from error

    def _run(self, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        names = [value.name for value in self._signature.outputs]
        return dict(zip(names, self._runtime.run(names, arrays), strict=True))

    def _decoder(self, batch: int, capacity: int) -> Decoder:
        del capacity
        engine = _OrtEngine(self._runtime, self._signature)
        if not self._has_cache:
            return RecomputingDecoder(engine, self._signature, batch)
        if is_fixed(self._signature):
            return FixedDecoder(engine, self._signature)
        return GrowingDecoder(engine, self._signature, batch)


class _OrtEngine:
    """Runs a model on values of ONNX Runtime: caches never become NumPy arrays."""

    def __init__(self, runtime: onnxruntime.InferenceSession, signature: Signature) -> None:
        self._runtime = runtime
        self._inputs = [value.name for value in signature.inputs]
        self._outputs = [value.name for value in signature.outputs]

    def put(self, array: npt.NDArray[Any]) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def get(self, value: onnxruntime.OrtValue) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = value.numpy()
        return array

    def run(self, inputs: Sequence[onnxruntime.OrtValue]) -> Sequence[onnxruntime.OrtValue]:
        feeds = dict(zip(self._inputs, inputs, strict=True))
        with naming_failures():
            outputs: Sequence[onnxruntime.OrtValue] = self._runtime.run_with_ort_values(
                self._outputs, feeds
            )
        return outputs


def _check_language_model(path: Path, manifest: Manifest) -> None:
    """Refuse a signature that decoding could not serve."""
    signature = manifest.signature
    inputs = {value.role for value in signature.inputs}
    logits = signature.output("logits")
    if "input_ids" not in inputs or logits is None or "tensor" in inputs:
        raise _unfit(path, "it needs input_ids and logits, and no inputs of unknown role")
    if len(logits.shape) != 3 or not isinstance(logits.shape[-1], int) or logits.dtype != "float32":
        raise _unfit(path, "its logits are not float32 [batch, sequence, vocabulary]")
    pairs = signature.cache_pairs()
    if pairs and "attention_mask" not in inputs:
        raise _unfit(path, "with a cache, attention_mask must tell the number of tokens so far")
    for past, present in pairs:
        if past.is_state:
            if past.dtype != present.dtype or not _keeps_its_size(past, present):
                raise _unfit(path, f"the state {past.name} is not of one fixed size per row")
        elif not _grows_along_one_axis(past, present):
            raise _unfit(path, f"the cache {past.name} is not [batch, ..., capacity, ...]")


def _keeps_its_size(past: ValueInfo, present: ValueInfo) -> bool:
    """Every axis but the batch is a number, before and afterwards the same."""
    sizes = past.shape[1:]
    return sizes == present.shape[1:] and all(isinstance(size, int) for size in sizes)


def _grows_along_one_axis(past: ValueInfo, present: ValueInfo) -> bool:
    """The axis has a name, or, where all sizes are fixed, another size afterwards."""
    if past.dtype != present.dtype or len(past.shape) != len(present.shape):
        return False
    named = [size for size in past.shape[1:] if isinstance(size, str)]
    sizes = zip(past.shape[1:], present.shape[1:], strict=True)
    grown = [after for size, after in sizes if size != after]
    return len(named) == 1 or (not named and len(grown) == 1 and isinstance(grown[0], int))


def _unfit(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{path} cannot run as a causal language model: {reason}",
        remedy="compile the model again",
    )


def _check_values(
    path: Path,
    declared: Sequence[ValueInfo],
    actual: Sequence[Any],
    *,
    may_be_narrower: bool = False,
) -> None:
    """Compare the manifest with the model: buffers are allocated by what the manifest says.

    Args:
        path: Of the model.
        declared: What the manifest says.
        actual: What ONNX Runtime says.
        may_be_narrower: Whether ONNX Runtime may know the number that a formula of other sizes
            stands for: of outputs, by what they are added to.
    """
    found = {value.name: value for value in actual}
    for value in declared:
        if value.name not in found:
            raise _mismatch(path, value, "the model has no such value")
        dtype = found[value.name].type.removeprefix("tensor(").removesuffix(")")
        if _ORT_DTYPES.get(dtype, dtype) != value.dtype:
            raise _mismatch(path, value, f"the model's is {dtype}")
        shape = found[value.name].shape
        if len(shape) != len(value.shape) or any(
            isinstance(size, int) and size != said and not (may_be_narrower and _is_formula(said))
            for size, said in zip(shape, value.shape, strict=True)
        ):
            raise _mismatch(path, value, f"the model's shape is {shape}")
    if missing := found.keys() - {value.name for value in declared}:
        raise ArtifactError(
            f"the manifest of {path} does not describe {sorted(missing)[0]!r} of the model",
            remedy="compile the model again",
        )


def _is_formula(size: int | str) -> bool:
    return isinstance(size, str) and not size.isidentifier()


def _mismatch(path: Path, value: ValueInfo, problem: str) -> QCompileError:
    said = f"{value.dtype} {list(value.shape)}"
    return ArtifactError(
        f"the manifest of {path} describes {value.name!r} as {said}, but {problem}",
        remedy="compile the model again",
    )


def _physical_cores() -> int:
    """Physical cores that this process may use; threads on siblings only fight for one core."""
    allowed = os.sched_getaffinity(0)
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        return len({Path(siblings.format(cpu)).read_text() for cpu in allowed})
    except OSError:
        return len(allowed)
