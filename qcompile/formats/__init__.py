"""What is stored for a quantized weight, and how it is named."""

from qcompile.formats.base import Format, QuantizedWeight, ScalarFormat, StoredWeight
from qcompile.formats.grid import Grid, GroupParameters, ScaleSearch
from qcompile.formats.integer import IntegerFormat
from qcompile.formats.integer_scale import IntegerScaleFormat
from qcompile.formats.lookup import LookupFormat
from qcompile.formats.registry import parse_format
from qcompile.formats.rtn import Rounded, relative_error, rtn
from qcompile.formats.sparse import SparseFormat
from qcompile.formats.split import SplitFormat
from qcompile.formats.stored import stored_weight
from qcompile.formats.vector import VectorFormat

__all__ = [
    "Format",
    "Grid",
    "GroupParameters",
    "IntegerFormat",
    "IntegerScaleFormat",
    "LookupFormat",
    "QuantizedWeight",
    "Rounded",
    "ScalarFormat",
    "ScaleSearch",
    "SparseFormat",
    "SplitFormat",
    "StoredWeight",
    "VectorFormat",
    "parse_format",
    "relative_error",
    "rtn",
    "stored_weight",
]
