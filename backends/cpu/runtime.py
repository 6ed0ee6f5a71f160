"""Runs compiled models on the CPU with ONNX Runtime; the weights are memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from qcompile.backends.cpu.decoding import (
    PREFILL_CHUNK,
    CachedDecoder,
    FloatArray,
    IntArray,
    RecomputingDecoder,
    TokenBatch,
    run_without_cache,
)
from qcompile.errors import ArtifactError, QCompileError, RecipeError
from qcompile.kernels.cpu import library_path
from qcompile.manifest import Manifest, Role, ValueInfo

MODEL_NAME = "model.onnx"

_ERRORS_ONLY = 3  # ONNX Runtime's warnings speak of graphs, not of what the user did
_ORT_DTYPES = {"float": "float32", "double": "float64"}
_ORT_ERRORS = (
    ort_state.EPFail,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)


class CpuSession:
    """A loaded model.

    Args:
        directory: The artifact.
        manifest: Its manifest.
        threads: Threads that share the work of a node; by default one per physical core that
            this process may use.

    Raises:
        ArtifactError: If ONNX Runtime cannot load the model, or it is not what the manifest says.
        RecipeError: If `threads` is less than 1.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise RecipeError(f"threads is {threads}", remedy="it must be 1 or more, or None")
        path = directory / MODEL_NAME
        self._manifest = manifest
        self._signature = manifest.signature
        self._has_cache = bool(self._signature.cache_pairs())
        if manifest.task == "causal_lm":
            _check_language_model(path, manifest)
        self._runtime = _open(path, manifest, threads or _physical_cores())
        _check_values(path, self._signature.inputs, self._runtime.get_inputs())
        _check_values(path, self._signature.outputs, self._runtime.get_outputs())

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that the logits of a language model are over."""
        logits = self._signature.output("logits")
        size = logits.shape[-1] if logits is not None else 0
        return size if isinstance(size, int) else 0

    @property
    def takes_padding(self) -> bool:
        """Whether padding can be masked, so that rows of different lengths share a batch."""
        return self._signature.input("attention_mask") is not None

    def run(self, inputs: Mapping[str, npt.ArrayLike]) -> dict[str, npt.NDArray[Any]]:
        """Map inputs to outputs, both by name.

        Args:
            inputs: One array for every input of the signature.

        Raises:
            RecipeError: If an input is missing, unknown, or of the wrong type or shape.
        """
        declared = {value.name: value for value in self._signature.inputs}
        if inputs.keys() != declared.keys():
            name = sorted(inputs.keys() ^ declared.keys())[0]
            problem = "is missing" if name in declared else "is not one of the model's"
            raise RecipeError(
                f"the input {name!r} {problem}", remedy=f"pass exactly: {', '.join(declared)}"
            )
        feeds = {name: _as_declared(array, declared[name]) for name, array in inputs.items()}
        names = [value.name for value in self._signature.outputs]
        try:
            return dict(zip(names, self._runtime.run(names, feeds), strict=True))
        except _ORT_ERRORS as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise RecipeError(f"the model cannot run the inputs {shapes}: {error}") from error

    def forward(
        self,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        position_ids: npt.ArrayLike | None = None,
        token_type_ids: npt.ArrayLike | None = None,
    ) -> FloatArray:
        """Logits at every position, ``[batch, sequence, vocabulary]``, without any past.

        Args:
            input_ids: ``[batch, sequence]``.
            attention_mask: ``[batch, sequence]``, 0 at padding on either side.
            position_ids: ``[batch, sequence]``; by default they count the real tokens.
            token_type_ids: ``[batch, sequence]``, for models that take them; by default 0.

        Raises:
            RecipeError: If an argument does not fit the model.
        """
        if self._signature.output("logits") is None:
            raise RecipeError("this model has no logits", remedy="use run(inputs)")
        ids = self._check_ids(input_ids)
        tokens = TokenBatch(
            ids,
            self._check_like(ids, "attention_mask", attention_mask),
            self._check_like(ids, "position_ids", position_ids),
            self._check_like(ids, "token_type_ids", token_type_ids),
        )
        batch, sequence = ids.shape
        if not self._has_cache:
            return run_without_cache(self._runtime, self._signature, tokens, count=sequence)
        decoder = CachedDecoder(self._runtime, self._signature, batch, sequence)
        if sequence <= PREFILL_CHUNK:
            return decoder.append(tokens, count=sequence)
        logits = np.empty((batch, sequence, self.vocabulary_size), np.float32)
        for columns, part in tokens.chunks(PREFILL_CHUNK):
            logits[:, columns] = decoder.append(part, count=columns.stop - columns.start)
        return logits

    def decoder(self, batch: int, capacity: int) -> CachedDecoder | RecomputingDecoder:
        """An empty decoder for `batch` rows that are expected to hold `capacity` tokens.

        A causal model without cache inputs is run over its whole text for every token.

        Raises:
            RecipeError: If the model does not generate.
        """
        if self._manifest.task != "causal_lm":
            raise RecipeError(
                "this artifact holds no causal language model: it cannot generate",
                remedy="use forward() or run(inputs)",
            )
        if self._has_cache:
            return CachedDecoder(self._runtime, self._signature, batch, capacity)
        return RecomputingDecoder(self._runtime, self._signature, batch)

    def _check_ids(self, input_ids: npt.ArrayLike) -> IntArray:
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or 0 in ids.shape or ids.dtype.kind not in "iu":
            raise RecipeError(
                f"input_ids is {ids.dtype} {list(ids.shape)}",
                remedy="pass integers [batch, sequence], at least one",
            )
        limit = self.vocabulary_size if self._manifest.task == "causal_lm" else ids.max() + 1
        if ids.min() < 0 or ids.max() >= limit:
            culprit = int(ids.min() if ids.min() < 0 else ids.max())
            raise RecipeError(
                f"input_ids holds the token id {culprit}; the model knows 0 to {limit - 1}",
                remedy="use the tokenizer of this model",
            )
        longest = self._manifest.generation.max_context
        if longest is not None and ids.shape[1] > longest:
            raise RecipeError(
                f"input_ids has {ids.shape[1]} tokens a row; the model was made for {longest}",
                remedy="pass shorter rows",
            )
        return ids.astype(np.int64, copy=False)

    def _check_like(
        self, ids: IntArray, role: Role, given: npt.ArrayLike | None
    ) -> IntArray | None:
        if given is None:
            return None
        array = np.asarray(given)
        if array.shape != ids.shape or array.dtype.kind not in "iub":
            raise RecipeError(
                f"{role} is {array.dtype} {list(array.shape)}",
                remedy=f"pass integers of the shape of input_ids, {list(ids.shape)}",
            )
        needed = not array.all() if role == "attention_mask" else True
        if needed and self._signature.input(role) is None:
            raise RecipeError(f"this model takes no {role}", remedy="leave it out")
        return array.astype(np.int64, copy=False)


def _open(path: Path, manifest: Manifest, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    try:
        if manifest.kernel_layout_version is not None:
            options.register_custom_ops_library(str(library_path()))
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except _ORT_ERRORS as error:
        raise ArtifactError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}",
            remedy="upgrade onnxruntime, or compile the model again",
        ) from error


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
        growing = [size for size in past.shape[1:] if isinstance(size, str)]
        if (
            len(growing) != 1
            or past.dtype != present.dtype
            or len(past.shape) != len(present.shape)
        ):
            raise _unfit(path, f"the cache {past.name} is not [batch, ..., capacity, ...]")


def _unfit(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{path} cannot run as a causal language model: {reason}",
        remedy="compile the model again",
    )


def _check_values(path: Path, declared: Sequence[ValueInfo], actual: Sequence[Any]) -> None:
    """Compare the manifest with the model: buffers are allocated by what the manifest says."""
    found = {value.name: value for value in actual}
    for value in declared:
        if value.name not in found:
            raise _mismatch(path, value, "the model has no such value")
        dtype = found[value.name].type.removeprefix("tensor(").removesuffix(")")
        if _ORT_DTYPES.get(dtype, dtype) != value.dtype:
            raise _mismatch(path, value, f"the model's is {dtype}")
        shape = found[value.name].shape
        if len(shape) != len(value.shape) or any(
            isinstance(size, int) and size != said
            for size, said in zip(shape, value.shape, strict=True)
        ):
            raise _mismatch(path, value, f"the model's shape is {shape}")
    if missing := found.keys() - {value.name for value in declared}:
        raise ArtifactError(
            f"the manifest of {path} does not describe {sorted(missing)[0]!r} of the model",
            remedy="compile the model again",
        )


def _mismatch(path: Path, value: ValueInfo, problem: str) -> QCompileError:
    said = f"{value.dtype} {list(value.shape)}"
    return ArtifactError(
        f"the manifest of {path} describes {value.name!r} as {said}, but {problem}",
        remedy="compile the model again",
    )


def _as_declared(given: npt.ArrayLike, value: ValueInfo) -> npt.NDArray[Any]:
    array = np.asarray(given)
    # Widening and, for convenience, Python's own floats and ints; never float to int.
    fits_type = np.can_cast(array.dtype, value.dtype, casting="same_kind")
    fits_shape = len(array.shape) == len(value.shape) and all(
        isinstance(said, str) or size == said
        for size, said in zip(array.shape, value.shape, strict=True)
    )
    if not (fits_type and fits_shape):
        raise RecipeError(
            f"the input {value.name!r} is {array.dtype} {list(array.shape)}",
            remedy=f"pass {value.dtype} {list(value.shape)}",
        )
    return np.ascontiguousarray(array, dtype=value.dtype)


def _physical_cores() -> int:
    """Physical cores that this process may use; threads on siblings only fight for one core."""
    allowed = os.sched_getaffinity(0)
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        return len({Path(siblings.format(cpu)).read_text() for cpu in allowed})
    except OSError:
        return len(allowed)
