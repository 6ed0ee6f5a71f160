"""The codebooks that codes are looked up in, by name: a vector for each code.

``higgs<dimension>x<points>``, such as ``higgs2x256``, are the grids of least squared error for
vectors of independent normal numbers of variance 1, computed by
`qcompile.kernels.lookup_vectors.fit_normal_grids`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

_PREFIX = "higgs"
_FILE = Path(__file__).with_name("normal_grids.json")

Codebook = tuple[tuple[float, ...], ...]


def codebook(name: str) -> Codebook:
    """The vector of each code, numbers of seven digits.

    Args:
        name: Of the table above.

    Raises:
        ValueError: There is no such codebook.
    """
    known = _normal_grids()
    grid = known.get(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else None
    if grid is None:
        raise ValueError(f"'{name}' is no codebook; known: {', '.join(codebook_names())}")
    return grid


def codebook_names() -> tuple[str, ...]:
    """Every codebook."""
    return tuple(f"{_PREFIX}{size}" for size in _normal_grids())


@cache
def _normal_grids() -> dict[str, Codebook]:
    stored = json.loads(_FILE.read_text(encoding="utf-8"))
    return {
        size: tuple(tuple(map(float, vector)) for vector in grid) for size, grid in stored.items()
    }
