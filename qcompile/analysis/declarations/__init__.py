"""What every operator does to the bases of its operands: one table per theme.

To add an operator, write a function that looks up the feature axes of its operands, makes or
passes on those of its result, and declares links, ports and blockers; enter it in a table.
"""

from __future__ import annotations

from typing import Any

from qcompile.analysis.declarations import attention, elementwise, layers, movements, norms
from qcompile.analysis.features import Declaration

DECLARATIONS: dict[Any, Declaration] = {
    **layers.DECLARATIONS,
    **norms.DECLARATIONS,
    **elementwise.DECLARATIONS,
    **attention.DECLARATIONS,
    **movements.DECLARATIONS,
}
"""The declaration of every operator that lets some transform through."""
