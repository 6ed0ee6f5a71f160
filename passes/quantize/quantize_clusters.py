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
from qcompile.passes.quantize.layers import LINEAR
from qcompile.passes.quantize.policy import matches_any
from qcompile.passes.transform.clusters import cluster_grids, clusters_of

FORMATS: Mapping[str, int] = {f"int{bits}": bits for bits in range(2, 9)}
"""Formats of codes, and their bits."""

Grids = tuple[Tensor, Tensor]
"""Scale ``[K]`` float32 and zero point ``[K]`` uint8."""


class QuantizeClusters(Pass):
    """Rounds the input of each linear whose weight is quantized, with a static grid per cluster.

    Clusters are those that `Rptq` has made; an input without any is one cluster. Scales and zero
    points are stored per channel, the same within a cluster::

        linear(x, w)   =>   linear(qc.dequantize(qc.quantize(x, s, z, 8, 1), s, z, 8, 1), w)

    Linears that share an input share the nodes. Each rounded input leaves a record in the result's
    details: ``input, bits, clusters, weights``.

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
        self._bits = FORMATS[format]
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
            stem = names[0].removesuffix(".weight")
            for part, tensor in zip(("input_scale", "input_zero_point"), grids[x], strict=True):
                program.weights.put(f"{stem}.{part}", tensor)
            with editor.before(linears[0]):
                grid = [editor.weight(f"{stem}.input_{p}") for p in ("scale", "zero_point")]
                codes = editor.call(dialect.quantize, x, *grid, self._bits, 1)
                rounded = editor.call(dialect.dequantize, codes, *grid, self._bits, 1)
            for linear in linears:
                linear.update_arg(0, rounded)
            result.rewrites += len(linears)
            sizes = list(clusters_of(linears[0]))
            result.details.append(
                {"input": x.name, "bits": self._bits, "clusters": sizes, "weights": names}
            )
        return result

    def grids(
        self, program: Program, inputs: Mapping[fx.Node, Sequence[fx.Node]], context: Context
    ) -> dict[fx.Node, Grids]:
        """The grid of each input, measured on the context's calibration data."""
        requests = [Request(x, ChannelRange) for x in inputs]
        found = measure(program, requests, context, "rounding by clusters")
        grids = {}
        for x, linears in inputs.items():
            seen = found.of(x, ChannelRange)
            grids[x] = cluster_grids(seen.low, seen.high, clusters_of(linears[0]), self._bits)
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
