"""How far two values are apart, where that means anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.passes.equivalence.cases import Case

INFINITE = float("inf")


def difference(case: Case, node: fx.Node, expected: Any, found: Any) -> float:
    """Max |found - expected| over max |expected|, at positions that are no padding.

    Integers, flags and sizes must be equal: their difference is 0 or infinite. Numbers that are
    not finite must be the same on both sides.

    Args:
        case: The inputs that gave the values.
        node: The node of `expected`; its symbolic axes tell which ones run over tokens.
        expected: The value before: a tensor, a size, or a tuple of such.
        found: The value after.
    """
    shape = getattr(node.meta.get("val"), "shape", ())
    return _difference(case, shape, expected, found)


def is_telling(expected: Any) -> bool:
    """Whether enough of a value is finite for a comparison to prove something."""
    if isinstance(expected, (list, tuple)):
        return all(is_telling(item) for item in expected)
    if not isinstance(expected, Tensor) or not expected.is_floating_point():
        return True
    return expected.numel() > 0 and float(torch.isfinite(expected).double().mean()) >= 0.5


def _difference(case: Case, shape: Any, expected: Any, found: Any) -> float:
    if isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)):
        if len(expected) != len(found):
            return INFINITE
        pairs = zip(expected, found, strict=True)
        return max((_difference(case, (), one, other) for one, other in pairs), default=0.0)
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return 0.0 if type(expected) is type(found) and expected == found else INFINITE
    if expected.shape != found.shape:
        return INFINITE
    kept = _kept_positions(case, shape, expected)
    if kept is not None:
        expected, found = expected[kept], found[kept]
    return _largest(expected, found)


def _largest(expected: Tensor, found: Tensor) -> float:
    if torch.equal(expected, found):
        return 0.0
    if not expected.is_floating_point() or not found.is_floating_point():
        return INFINITE
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return INFINITE
    same = (expected == found) | (expected.isnan() & found.isnan())
    if not bool((finite | same).all()):
        return INFINITE
    if not bool(finite.any()):
        return 0.0
    expected, found = expected[finite], found[finite]
    scale = float(expected.abs().max())
    error = float((found - expected).abs().max())
    return error / scale if scale > 0 else (0.0 if error == 0 else INFINITE)


def _kept_positions(case: Case, shape: Any, value: Tensor) -> Tensor | None:
    """True where every token axis of `value` is at a token that is no padding; None for all."""
    if case.keep is None or bool(case.keep.all()) or len(shape) != value.dim():
        return None
    batch, total = case.keep.shape
    masks = {case.query: case.keep[:, total - case.query :], total: case.keep}
    kept: Tensor | None = None
    symbolic = [axis for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)]
    rows = next((axis for axis in symbolic if value.shape[axis] == batch), None)
    for axis in symbolic:
        size = value.shape[axis]
        view = [1] * value.dim()
        view[axis] = size
        if size == batch * case.query and size not in masks:
            mask = masks[case.query].reshape(view)
        elif size in masks and axis != rows:
            if rows is not None and rows < axis:
                view[rows] = batch
                mask = masks[size].reshape(view)
            else:
                mask = masks[size].all(0).reshape(view)
        else:
            continue
        kept = mask.expand(value.shape) if kept is None else kept & mask
    return kept
