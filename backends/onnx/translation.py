"""Translations: functions that write one call of a program in ONNX, and tables of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import onnx_ir as ir

from qcompile.backends.onnx.values import SymbolicScalar

Emitted = (
    ir.Value | SymbolicScalar | bool | int | float | Sequence[ir.Value] | None
)  # fmt: skip
"""What a translation gives: a tensor, a number, several tensors, or nothing (assertions)."""

Translation = Callable[..., Emitted]
"""``translation(builder, *args, **kwargs)``: the arguments of the call, with tensors as `ir.Value`
and sizes as `int` or `SymbolicScalar`; everything else (dtypes, None, numbers, strings) as it is.
Raises `UnsupportedError` for arguments that it has no ONNX for."""


_Function = TypeVar("_Function", bound=Translation)


class Table(dict[Any, Translation]):
    """Call targets to their translations; filled by the module that defines it and no other."""

    def register(self, *targets: Any) -> Callable[[_Function], _Function]:
        """Decorates the translation of the given targets."""

        def add(translation: _Function) -> _Function:
            self.update(dict.fromkeys(targets, translation))
            return translation

        return add
