"""Symbolic sizes as expressions."""

from __future__ import annotations

from typing import Any

import sympy
import torch


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """A size as a sympy expression: a number, a symbol, or arithmetic on symbols."""
    symbolic: Any = size
    return sympy.Integer(size) if isinstance(size, int) else symbolic.node.expr


def is_symbolic(size: object) -> bool:
    """Whether a size is known only when the program runs."""
    return isinstance(size, torch.SymInt)
