"""Inputs of linears become codes of one static grid per cluster of channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, fx

from qcompile.calibration.requests import Request
from qcompile.calibration.statistics import ChannelRange
from qcompile.errors import RecipeError
from qcompile.formats import stored_weight
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Lossy, Numerics, Pass, PassResult, Skip
from qcompile.passes.measure import measure
from qcompile.passes.quantize.activation_formats import Grid, IntegerActivations, store_grid
from qcompile.passes.quantize.layers import LINEAR
from qcompile.passes.quantize.policy import matches_any
from qcompile.passes.transform.clusters import cluster_grids, clusters_of

FORMATS: Mapping[str, IntegerActivations] = {
    f"int{bits}": IntegerActivations(bits, symmetric=False) for bits in range(2, 9)
}
"""Formats of codes, all asymmetric, as recipes name them."""


class QuantizeClusters(Pass):
    """Rounds the input of each linear whose weight is quantized, with a static grid per cluster.

    Clusters are those that `Rptq` has made; an input without any is one cluster. Scales and zero
    points are stored per channel, the same within a cluster::

        linear(x, w)   =>   linear(qc.dequantize(qc.quantize(x, s, z, 8, 1), s, z, 8, 1), w)

    Linears that share an input share the nodes. Each rounded input leaves a record in the result's
    details: ``input, format, clusters, weights``.

    Args:
        format: ``"int2"`` to ``"int8"``, asymmetric.
        ignore: Patterns on names of weights whose inputs stay float.

    Raises:
        RecipeError: The format is unknown.

    Source: Yuan et al. 2023 (RPTQ, arXiv 2304.01089).
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.WEIGHTS_QUANTIZED})
    numerics: ClassVar[Numerics] = Lossy()

    def __init__(self, format: str = "int8", ignore: Iterable[str] = ()) -> None:
        if format not in FORMATS:
            raise RecipeError(
                f"activations cannot be '{format}'", remedy=f"known: {', '.join(FORMATS)}"
            )
        self._format = FORMATS[format]
        self._ignore = tuple(ignore)

    def run(self, program: Program, context: Context) -> PassResult:
        """Rounds inputs, in graph order.

        Raises:
            DataError: There is no calibration data, or it does not fit.
        """
        result = PassResult()
        inputs = self._inputs(program, result)
        grids = self.grids(program, inputs, context)
        editor = Editor(program)
        for x, linears in inputs.items():
            names = [_weight(linear) for linear in linears]
            with editor.before(linears[0]):
                grid = store_grid(editor, names[0].removesuffix(".weight"), grids[x])
                rounded = self._format.emit(editor, x, grid, 1)
            for linear in linears:
                linear.update_arg(0, rounded)
            result.rewrites += len(linears)
            sizes = list(clusters_of(linears[0]))
            result.details.append(
                {
                    "input": x.name,
                    "format": str(self._format),
                    "clusters": sizes,
                    "weights": names,
                }
            )
        return result

    def grids(
        self, program: Program, inputs: Mapping[fx.Node, Sequence[fx.Node]], context: Context
    ) -> dict[fx.Node, Grid[Tensor]]:
        """The grid of each input, ``[K]``, measured on the context's calibration data."""
        requests = [Request(x, ChannelRange) for x in inputs]
        found = measure(program, requests, context, "rounding by clusters")
        grids = {}
        for x, linears in inputs.items():
            seen = found.of(x, ChannelRange)
            grids[x] = cluster_grids(seen.low, seen.high, clusters_of(linears[0]), self._format)
        return grids

    def _inputs(self, program: Program, result: PassResult) -> dict[fx.Node, list[fx.Node]]:
        """Values to round and the linears that read them; the others become skips."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for linear in program.calls(LINEAR):
            x = linear.args[0]
            if stored_weight(linear.args[1]) is None or not isinstance(x, fx.Node):
                continue
            if matches_any(self._ignore, _weight(linear)):
                result.skips.append(Skip(_weight(linear), "its input is kept float by the recipe"))
            elif x.target == dialect.dequantize:
                result.skips.append(Skip(_weight(linear), "its input is rounded already"))
            else:
                found.setdefault(x, []).append(linear)
        return found


def _weight(linear: fx.Node) -> str:
    stored = stored_weight(linear.args[1])
    assert stored is not None
    return stored.name
