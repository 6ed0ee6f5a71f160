"""Where a program's numbers live: lazy, shared, never copied before they must be.

A `WeightStore` maps names to *expressions* over the tensors of a checkpoint. An expression is a
source tensor, a tensor in memory, or an operator applied to other expressions: a view of a stacked
tensor, a transposed weight, a transform that a pass has absorbed. Nothing is read before
`materialize`; arithmetic happens there once, in float64, and is rounded once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from qcompile.errors import ModelError


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that need not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        """The spec of an existing tensor."""
        return TensorSpec(tuple(tensor.shape), tensor.dtype)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return self.elements * self.dtype.itemsize


@runtime_checkable
class TensorSource(Protocol):
    """A checkpoint: named tensors that are read one at a time.

    Attributes:
        identity: What it is, for a person: its path or paths.
    """

    identity: str

    def specs(self) -> Mapping[str, TensorSpec]:
        """Name to shape and dtype, without reading data."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, memory-mapped where possible; the caller must not write to it."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when the checkpoint does, without reading all of its data."""
        ...


class MemorySource:
    """A checkpoint held in memory, such as a module's state.

    Args:
        tensors: Name to tensor; not copied.
        identity: What to call it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], identity: str = "memory") -> None:
        self.identity = identity
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}

    def specs(self) -> Mapping[str, TensorSpec]:
        """Name to shape and dtype."""
        return {name: TensorSpec.of(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """The tensor itself."""
        return self._tensors[name]

    def fingerprint(self) -> str:
        """A hash over names, shapes and values (the values are at hand, so they count)."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors.items()):
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, by its name there."""

    checkpoint: TensorSource
    name: str


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in memory."""

    tensor: Tensor


@dataclass(frozen=True, eq=False)
class Apply:
    """An operator applied to other expressions.

    Attributes:
        function: Pure; receives the materialized operands in order.
        operands: What it is applied to.
        exact: Whether it only moves elements (a view, a slice, a concatenation), so that no
            rounding happens and float64 is not needed.
        label: A short name for people, such as ``"transpose"``.
    """

    function: Callable[..., Tensor]
    operands: tuple[Expression, ...]
    exact: bool
    label: str


Expression = Source | Stored | Apply


class WeightStore:
    """Names to expressions. Copies are shallow and cheap; expressions are never changed in place.

    An entry's spec is what the *program* sees: weights of a bfloat16 checkpoint stand here as
    float32, the dtype of the computation, and are widened when they are read.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Expression, TensorSpec]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def copy(self) -> WeightStore:
        """A store whose entries can be redefined without touching this one."""
        twin = WeightStore()
        twin._entries = dict(self._entries)
        return twin

    def spec(self, name: str) -> TensorSpec:
        """Shape and stored dtype of an entry.

        Raises:
            KeyError: If there is no such entry.
        """
        return self._entries[name][1]

    def expression(self, name: str) -> Expression:
        """How an entry is made; two names with the same expression are tied."""
        return self._entries[name][0]

    def define(self, name: str, expression: Expression, spec: TensorSpec) -> None:
        """Adds an entry, or redefines one."""
        self._entries[name] = (expression, spec)

    def put(self, name: str, tensor: Tensor) -> None:
        """Adds a tensor that exists in memory."""
        self.define(name, Stored(tensor.detach()), TensorSpec.of(tensor))

    def derive(
        self,
        name: str,
        operands: tuple[str, ...],
        function: Callable[..., Tensor],
        spec: TensorSpec,
        *,
        exact: bool,
        label: str,
    ) -> None:
        """Defines `name` as `function` of other entries (of their present definitions).

        Args:
            name: The entry to define; may be one of `operands`.
            operands: Names of existing entries, in the order of the function's arguments.
            function: Pure; gets float64 tensors unless all that is pending is exact.
            spec: Shape and dtype of the result.
            exact: Whether the function only moves elements.
            label: A short name for people.
        """
        expressions = tuple(self.expression(operand) for operand in operands)
        self.define(name, Apply(function, expressions, exact, label), spec)

    def remove(self, name: str) -> None:
        """Forgets an entry."""
        del self._entries[name]

    def keep_only(self, names: set[str]) -> None:
        """Forgets all entries but these."""
        self._entries = {name: self._entries[name] for name in self._entries if name in names}

    def materialize(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers of an entry.

        Args:
            name: The entry.
            dtype: For floating entries, the dtype wanted (the stored one unless given); pending
                arithmetic is done in float64 and rounded to it once. Others keep theirs.

        Returns:
            A tensor of the entry's shape, not to be written to.

        Raises:
            ModelError: If the checkpoint's tensor does not have the shape that the program has.
        """
        expression, spec = self._entries[name]
        value = _evaluate(expression, torch.float64 if _has_arithmetic(expression) else None)
        if tuple(value.shape) != spec.shape:
            raise ModelError(
                f"weight '{name}' has shape {list(value.shape)}, the program needs "
                f"{list(spec.shape)}",
                remedy="check that config and checkpoint belong together",
            )
        wanted = (dtype or spec.dtype) if spec.dtype.is_floating_point else spec.dtype
        return value.to(wanted)


def describe(expression: Expression) -> str:
    """An expression as a person reads it: ``transpose(model.wte.weight)``."""
    match expression:
        case Source(name=name):
            return name
        case Stored():
            return "(in memory)"
        case Apply(operands=operands, label=label):
            return f"{label}({', '.join(describe(operand) for operand in operands)})"


def sources(expression: Expression) -> Iterator[Source]:
    """The checkpoint tensors that an expression reads."""
    match expression:
        case Source():
            yield expression
        case Apply(operands=operands):
            for operand in operands:
                yield from sources(operand)


def _has_arithmetic(expression: Expression) -> bool:
    if not isinstance(expression, Apply):
        return False
    return not expression.exact or any(map(_has_arithmetic, expression.operands))


def _evaluate(expression: Expression, dtype: torch.dtype | None) -> Tensor:
    match expression:
        case Source(checkpoint=checkpoint, name=name):
            value = checkpoint.read(name)
        case Stored(tensor=tensor):
            value = tensor
        case Apply(function=function, operands=operands):
            return function(*(_evaluate(operand, dtype) for operand in operands))
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value
