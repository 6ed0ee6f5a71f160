"""Quantized weights, found again in a program's graph."""

from __future__ import annotations

from torch import fx

from qcompile.formats.base import Format, StoredWeight
from qcompile.formats.integer import IntegerFormat
from qcompile.formats.integer_scale import IntegerScaleFormat
from qcompile.formats.lookup import LookupFormat
from qcompile.formats.sparse import SparseFormat
from qcompile.formats.split import SplitFormat
from qcompile.formats.vector import VectorFormat

_FAMILIES: tuple[type[Format], ...] = (
    IntegerFormat,
    IntegerScaleFormat,
    LookupFormat,
    SplitFormat,
    SparseFormat,
    VectorFormat,
)


def stored_weight(node: object) -> StoredWeight | None:
    """The quantized weight that a node decodes.

    Args:
        node: An operand of a call.

    Returns:
        None if it is no node, or one that decodes no stored weight.
    """
    if not isinstance(node, fx.Node):
        return None
    found = (family.recognize(node) for family in _FAMILIES)
    return next((weight for weight in found if weight is not None), None)
