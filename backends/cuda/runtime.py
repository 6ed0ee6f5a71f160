"""Runs artifacts of the `cuda` target with torch.

On a machine without a CUDA device the same program runs on the CPU by its operators' references:
slowly, but with the same results, so that artifacts can be made and compared anywhere. With
``TRITON_INTERPRET=1`` the Triton kernels run there too, in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qcompile.backends.cpu.decoding import PREFILL_CHUNK, FloatArray, TokenBatch
from qcompile.backends.cuda import ops
from qcompile.backends.cuda.decoding import GrowingDecoder
from qcompile.backends.session import (
    check_inputs,
    check_like_ids,
    check_token_ids,
    vocabulary_size,
)
from qcompile.errors import ArtifactError, RecipeError
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.ir.serialize import load_program
from qcompile.manifest import Manifest


class CudaSession:
    """A loaded model.

    Args:
        directory: The artifact.
        manifest: Its manifest.
        device: Where to run; by default the current CUDA device, or the CPU where there is none.

    Raises:
        ArtifactError: If the program cannot be loaded, or it is not what the manifest says.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, *, device: str | torch.device | None = None
    ) -> None:
        self._manifest = manifest
        self._signature = manifest.signature
        self._program = load_program(directory)
        _check_signature(directory, self._program, manifest)
        self._has_cache = bool(self._signature.cache_pairs())
        if manifest.task == "causal_lm" and not self._has_cache:
            raise ArtifactError(
                f"{directory} cannot run as a causal language model: it has no cache",
                remedy="compile the model again",
            )
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._executor: _Executor | None = None

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that the logits of a language model are over."""
        return vocabulary_size(self._signature)

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
        arrays = check_inputs(inputs, self._signature)
        tensors = [torch.from_numpy(array).to(self._device) for array in arrays.values()]
        try:
            outputs = self._run(tensors)
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            raise RecipeError(f"the model cannot run the inputs {shapes}: {error}") from error
        names = (value.name for value in self._signature.outputs)
        return {name: value.cpu().numpy() for name, value in zip(names, outputs, strict=True)}

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
        ids = check_token_ids(input_ids, self._manifest)
        tokens = TokenBatch(
            ids,
            check_like_ids(ids, "attention_mask", attention_mask, self._signature),
            check_like_ids(ids, "position_ids", position_ids, self._signature),
            check_like_ids(ids, "token_type_ids", token_type_ids, self._signature),
        )
        decoder = self._decoder(len(ids))
        chunk = PREFILL_CHUNK if self._has_cache else ids.shape[1]
        parts = [decoder.append(part, count=part.ids.shape[1]) for _, part in tokens.chunks(chunk)]
        return np.concatenate(parts, axis=1)

    def decoder(self, batch: int, capacity: int) -> GrowingDecoder:
        """An empty decoder for `batch` rows; its cache grows as it is needed.

        Raises:
            RecipeError: If the model does not generate.
        """
        del capacity
        if self._manifest.task != "causal_lm":
            raise RecipeError(
                "this artifact holds no causal language model: it cannot generate",
                remedy="use forward() or run(inputs)",
            )
        return self._decoder(batch)

    def _decoder(self, batch: int) -> GrowingDecoder:
        return GrowingDecoder(self._run, self._signature, batch, self._device)

    def _run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if self._executor is None:
            self._executor = _Executor(self._program, self._device)
        return self._executor.run(*inputs)


class _Executor(Interpreter):
    """Runs a program whose weights are all on the device."""

    def __init__(self, program: Program, device: torch.device) -> None:
        placed = {name: program.weights.materialize(name).to(device) for name in program.weights}
        super().__init__(program, device=device, cache=placed)
        # On a CUDA device the dispatcher chooses the kernel; this is for Triton's interpreter.
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        self._linear: Any = ops.triton_linear if interpreted else ops.linear

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """One operator."""
        chosen = self._linear if target is ops.linear else target
        return super().call_function(chosen, args, kwargs)


def _check_signature(directory: Path, program: Program, manifest: Manifest) -> None:
    """Compare the manifest with the program, value by value."""
    signature = manifest.signature
    for values, ports, nodes in (
        (signature.inputs, program.signature.inputs, program.inputs),
        (signature.outputs, program.signature.outputs, program.results),
    ):
        if [value.name for value in values] != [port.name for port in ports]:
            raise ArtifactError(
                f"the manifest of {directory} names other inputs or outputs than the program",
                remedy="compile the model again",
            )
        for value, port, node in zip(values, ports, nodes, strict=True):
            found: Tensor = node.meta["val"]
            sizes = [size if isinstance(size, int) else None for size in found.shape]
            said = [size if isinstance(size, int) else None for size in value.shape]
            dtype = str(found.dtype).removeprefix("torch.")
            if (value.role, value.layer, value.dtype, said) != (
                port.role.value,
                port.layer,
                dtype,
                sizes,
            ):
                raise ArtifactError(
                    f"the manifest of {directory} describes {value.name!r} as {value.role}, "
                    f"{value.dtype} {list(value.shape)}; the program has {port.role.value}, "
                    f"{dtype} {list(found.shape)}",
                    remedy="compile the model again",
                )
