"""Running a program node by node: the reference that every target is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.program import Program

Hook = Callable[[fx.Node, Any], Any]
"""Called with each node and its value; what it returns takes the value's place."""


CACHE_BYTES = 8 << 30
"""How much of a program's weights is kept between runs: a model of 2 B parameters in float32."""


class Interpreter(fx.Interpreter):
    """Interprets a program, loading each weight when it is reached and freeing it after.

    Args:
        program: What to run.
        dtype: Floating dtype of the computation: float32, or float64 for checks. Weights are
            materialized in it, and casts to float32 in the graph follow it.
        device: Where to compute.
        hook: Sees, and may replace, the value of every node.
        cache: Weights already materialized, shared between runs; filled as weights are reached,
            up to `CACHE_BYTES`. What does not fit is read anew in each run, one at a time.
    """

    def __init__(
        self,
        program: Program,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        hook: Hook | None = None,
        cache: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(torch.nn.Module(), graph=program.graph)
        self.program = program
        self.dtype = dtype
        self.device = torch.device(device)
        self._hook = hook
        self._cache = cache
        self._cached_bytes = sum(value.nbytes for value in (cache or {}).values())

    @torch.no_grad()
    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """One tensor per result of the program.

        Args:
            *inputs: One tensor per placeholder; floating ones are cast to the dtype.
        """
        placed = [self._place(value) for value in inputs]
        return tuple(super().run(*placed, enable_io_processing=False))

    def run_node(self, n: fx.Node) -> Any:
        """The value of one node."""
        value = super().run_node(n)
        return value if self._hook is None else self._hook(n, value)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A weight."""
        del args, kwargs
        name = str(target)
        if self._cache is not None and name in self._cache:
            return self._cache[name]
        # Narrow floats (scales) keep their dtype: it is part of what a format means.
        wide = torch.float64 if self.dtype == torch.float64 else None
        value = self.program.weights.materialize(name, wide).to(self.device)
        if self._cache is not None and self._cached_bytes + value.nbytes <= CACHE_BYTES:
            self._cache[name] = value
            self._cached_bytes += value.nbytes
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """One operator, with dtypes and devices that follow the interpreter's."""
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._follow)
        if self.device.type != "cpu" and _makes_tensors(target):
            kwargs = {**kwargs, "device": self.device}
        value = super().call_function(target, args, kwargs)
        # Operators that make numbers of codes alone make float32.
        is_single = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(self.dtype) if is_single else value

    def _follow(self, value: Any) -> Any:
        if value is torch.float32:
            return self.dtype
        return self.device if isinstance(value, torch.device) else value

    def _place(self, value: Tensor) -> Tensor:
        value = value.to(self.device)
        return value.to(self.dtype) if value.is_floating_point() else value


def _makes_tensors(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and any(argument.name == "device" for argument in schema.arguments)
