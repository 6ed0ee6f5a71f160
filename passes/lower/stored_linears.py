"""Linear layers by how their weights are stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from qcompile.formats import Format, StoredWeight, stored_weight
from qcompile.ir.program import Program


def stored_linears(
    program: Program, family: type[Format]
) -> Iterator[tuple[fx.Node, StoredWeight]]:
    """Every linear layer whose weight is stored in a format of a family, with that weight."""
    for linear in program.calls(torch.ops.aten.linear.default):
        weight = stored_weight(linear.args[1])
        if weight is not None and isinstance(weight.format, family):
            yield linear, weight
