"""All translations of ATen."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qcompile.backends.onnx.aten_activation import ACTIVATION
from qcompile.backends.onnx.aten_conv import CONV
from qcompile.backends.onnx.aten_creation import CREATION
from qcompile.backends.onnx.aten_elementwise import ELEMENTWISE
from qcompile.backends.onnx.aten_indexing import INDEXING
from qcompile.backends.onnx.aten_linear import LINEAR
from qcompile.backends.onnx.aten_logic import LOGIC
from qcompile.backends.onnx.aten_norm import NORM
from qcompile.backends.onnx.aten_reduction import REDUCTION
from qcompile.backends.onnx.aten_shape import SHAPE
from qcompile.backends.onnx.translation import Translation

ATEN: Mapping[Any, Translation] = MappingProxyType(
    {
        **ELEMENTWISE,
        **LOGIC,
        **ACTIVATION,
        **SHAPE,
        **INDEXING,
        **REDUCTION,
        **CREATION,
        **LINEAR,
        **CONV,
        **NORM,
    }
)
"""Operator overloads to their translations."""
