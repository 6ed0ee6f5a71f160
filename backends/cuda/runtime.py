"""Runs artifacts of the `cuda` target with torch.

On a machine without a CUDA device the same program runs on the CPU by its operators' references:
slowly, but with the same results, so that artifacts can be made and compared anywhere. With
``TRITON_INTERPRET=1`` the Triton kernels run there too, in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from qcompile.backends.cuda import ops
from qcompile.backends.decoding import Decoder, GrowingDecoder, RecomputingDecoder
from qcompile.backends.session import ModelSession
from qcompile.errors import ArtifactError
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.ir.serialize import load_program
from qcompile.manifest import Manifest

_FAILURES = (RuntimeError, IndexError, TypeError, ValueError)
"""What torch raises when an operator cannot take what it is given."""


class CudaSession(ModelSession):
    """A loaded model.

    Args:
        directory: The artifact.
        manifest: Its manifest.
        device: Where to run; by default the current CUDA device, or the CPU where there is none.

    Raises:
        ArtifactError: If the program cannot be loaded, or it is not what the manifest says.
    """

    input_errors = _FAILURES

    def __init__(
        self, directory: Path, manifest: Manifest, *, device: str | torch.device | None = None
    ) -> None:
        self._program = load_program(directory)
        _check_signature(directory, self._program, manifest)
        super().__init__(manifest)
        if manifest.task == "causal_lm" and not self._has_cache:
            raise ArtifactError(
                f"{directory} cannot run as a causal language model: it has no cache",
                remedy="compile the model again",
            )
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._executor: _Executor | None = None

    def _run(self, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        engine = self._engine()
        outputs = engine.executor.run(*(engine.put(array) for array in arrays.values()))
        names = (value.name for value in self._signature.outputs)
        return {name: engine.get(value) for name, value in zip(names, outputs, strict=True)}

    def _decoder(self, batch: int, capacity: int) -> Decoder:
        del capacity
        kind = GrowingDecoder if self._has_cache else RecomputingDecoder
        return kind(self._engine(), self._signature, batch)

    def _engine(self) -> _TorchEngine:
        if self._executor is None:
            self._executor = _Executor(self._program, self._device)
        return _TorchEngine(self._executor, self._device)


class _TorchEngine:
    """Runs a program on tensors of its device: caches stay there."""

    def __init__(self, executor: _Executor, device: torch.device) -> None:
        self.executor = executor
        self._device = device

    def put(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def get(self, value: Tensor) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = value.cpu().numpy()
        return array

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        try:
            return self.executor.run(*inputs)
        except _FAILURES as error:
            raise ArtifactError(
                f"the program of this artifact failed as it ran: {str(error).strip()}",
                remedy="if memory lasts, compile the model again",
            ) from error


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
