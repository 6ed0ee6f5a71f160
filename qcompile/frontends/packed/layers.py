"""The layers of a packed checkpoint: their tensors, and checks that these fit together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import ModelError
from qcompile.ir.weights import TensorSource, TensorSpec


@dataclass(frozen=True)
class PackedWeight:
    """A weight that can be computed.

    Attributes:
        shape: Of the weight, [N, K] for a linear layer.
        decode: Reads and decodes it to float32.
    """

    shape: tuple[int, ...]
    decode: Callable[[], Tensor]


@dataclass(frozen=True)
class Stated:
    """What the config says of all layers; None where it does not, or where layers differ.

    Attributes:
        format: The variant of the method's layout.
        bits: Bits of a code.
        group_size: Inputs that share a scale; 0 for one scale per channel.
        block: (rows, columns) that share a scale.
    """

    format: str
    bits: int | None = None
    group_size: int | None = None
    block: tuple[int, int] | None = None


class Layers:
    """Collects the packed weights of a checkpoint.

    What a layer is made of is read off names and shapes: configs have overrides per layer, and
    the tensors are what counts.

    Attributes:
        source: The tensors as they are stored.
        specs: Their shapes and dtypes.
        stated: What the config says.
        found: Name (``X.weight``) to weight, filled by `add`.
        hidden: Names of the tensors that weights are made of, filled by `add`.
    """

    def __init__(self, source: TensorSource, stated: Stated) -> None:
        self.source = source
        self.specs = source.specs()
        self.stated = stated
        self.found: dict[str, PackedWeight] = {}
        self.hidden: set[str] = set()

    def modules(self, suffix: str) -> list[str]:
        """Layers that have a tensor of this suffix."""
        return [name[: -len(suffix) - 1] for name in self.specs if name.endswith(f".{suffix}")]

    def parts(self, module: str, suffixes: tuple[str, ...]) -> tuple[TensorSpec, ...]:
        """Specs of a layer's tensors; a `ModelError` names one that is missing."""
        missing = [suffix for suffix in suffixes if f"{module}.{suffix}" not in self.specs]
        if missing:
            raise self.broken(module, f"no tensor '{module}.{missing[0]}'")
        return tuple(self.specs[f"{module}.{suffix}"] for suffix in suffixes)

    def read(self, module: str, suffixes: tuple[str, ...]) -> tuple[Tensor, ...]:
        """A layer's tensors."""
        return tuple(self.source.read(f"{module}.{suffix}") for suffix in suffixes)

    def elements(self, module: str, suffix: str) -> int:
        """Number of elements of a layer's tensor."""
        return self.parts(module, (suffix,))[0].elements

    def add(
        self,
        module: str,
        shape: tuple[int, ...],
        decode: Callable[[], Tensor],
        suffixes: tuple[str, ...],
    ) -> None:
        """Adds the weight of a layer, made of the tensors with these suffixes."""
        self.found[f"{module}.weight"] = PackedWeight(shape, decode)
        self.hide(module, suffixes)

    def hide(self, module: str, suffixes: tuple[str, ...]) -> None:
        """Drops tensors of a layer that a float model does not have."""
        self.hidden |= {f"{module}.{suffix}" for suffix in suffixes} & self.specs.keys()

    def expect(self, module: str, suffix: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Checks shape and dtype of a layer's tensor."""
        spec = self.specs[f"{module}.{suffix}"]
        self.check(
            module,
            spec == TensorSpec(shape, dtype),
            f"{suffix} of shape {list(spec.shape)} and type {spec.dtype}, expected {list(shape)} "
            f"and {dtype}",
        )

    def require_matrix(self, module: str, spec: TensorSpec) -> None:
        """Checks that a tensor has two dimensions."""
        self.check(module, len(spec.shape) == 2, f"a tensor of shape {list(spec.shape)}")

    def check(self, module: str, holds: bool, what: str) -> None:
        """Raises `broken` unless the condition holds."""
        if not holds:
            raise self.broken(module, what)

    def broken(self, module: str, what: str) -> ModelError:
        """The error for a layer that cannot be dequantized; `what` completes "it has ..."."""
        return ModelError(
            f"layer '{module}' of '{self.source.identity}' cannot be dequantized: it has {what}",
            remedy="fetch the checkpoint again, or start from the float model",
        )

    def grouping(
        self, module: str, index: str | None, inputs: int, groups: int
    ) -> Callable[[], Tensor]:
        """The group of every input: stored, or as the sizes imply."""
        if index is not None and f"{module}.{index}" in self.specs:
            self.check(
                module, self.specs[f"{module}.{index}"].shape == (inputs,), f"{index} of wrong size"
            )
        size = self.stated.group_size or inputs
        if groups == 0 or -(-inputs // size) != groups:
            self.check(module, groups > 0 and inputs % groups == 0, f"{groups} groups of {inputs}")
            size = inputs // groups

        def columns() -> Tensor:
            if index is not None and f"{module}.{index}" in self.specs:
                stored = self.source.read(f"{module}.{index}").long()
                if int(stored.min()) >= 0:  # compressed-tensors fills what it does not use with -1
                    self.check(module, int(stored.max()) < groups, f"{index} past the last group")
                    return stored
            return torch.arange(inputs) // size

        return columns
