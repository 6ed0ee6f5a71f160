"""Inputs of linears with quantized weights become codes at run time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import fx

from qcompile.errors import RecipeError
from qcompile.formats import stored_weight
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Lossy, Numerics, Pass, PassResult, Skip
from qcompile.passes.quantize.layers import LINEAR
from qcompile.passes.quantize.policy import matches_any

FORMATS = {"int8": 8}
"""Activation formats (symmetric, dynamic) and the bits of their codes."""

GRANULARITIES = ("token", "group")


class QuantizeActivations(Pass):
    """Rounds the input of each linear whose weight is quantized, with scales measured at run time.

    Before::

        %2 = aten.linear(%x, %w)

    After::

        %2 = qc.dynamic_scale(%x, 8, 64)
        %3 = qc.quantize(%x, %2, None, 8, 64)
        %4 = qc.dequantize(%3, %2, None, 8, 64)
        %5 = aten.linear(%4, %w)

    Linears that share an input and a group size share the three nodes. Each rounded input leaves a
    record in the result's details: ``input, bits, group_size, weights``.

    Args:
        format: ``"int8"``.
        granularity: ``"token"``: one scale per token; ``"group"``: one per token and group of the
            weight (per token where the weight has one group per row).
        ignore: Patterns on names of weights whose inputs stay float.

    Raises:
        RecipeError: The format or the granularity is unknown.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.WEIGHTS_QUANTIZED})
    numerics: ClassVar[Numerics] = Lossy()

    def __init__(
        self, format: str = "int8", *, granularity: str = "token", ignore: Iterable[str] = ()
    ) -> None:
        if format not in FORMATS:
            raise RecipeError(
                f"activations cannot be '{format}'", remedy=f"known: {', '.join(FORMATS)}"
            )
        if granularity not in GRANULARITIES:
            raise RecipeError(
                f"unknown granularity '{granularity}'", remedy=f"known: {', '.join(GRANULARITIES)}"
            )
        self._bits = FORMATS[format]
        self._per_group = granularity == "group"
        self._ignore = tuple(ignore)

    def run(self, program: Program, context: Context) -> PassResult:
        """Rounds inputs, in graph order."""
        del context
        editor = Editor(program)
        result = PassResult()
        rounded: dict[tuple[fx.Node, int], tuple[fx.Node, list[str]]] = {}
        for linear in program.calls(LINEAR):
            weight = stored_weight(linear.args[1])
            source = linear.args[0]
            if weight is None or not isinstance(source, fx.Node):
                continue
            name = weight.name
            if matches_any(self._ignore, name):
                result.skips.append(Skip(name, "its input is kept float by the recipe"))
                continue
            if source.target == dialect.dequantize:
                result.skips.append(Skip(name, "its input is rounded already"))
                continue
            group_size = weight.format.group_size if self._per_group else 0
            key = (source, group_size)
            if key not in rounded:
                with editor.before(linear):
                    rounded[key] = self._round(editor, source, group_size), []
                result.details.append(
                    {
                        "input": source.name,
                        "bits": self._bits,
                        "group_size": group_size,
                        "weights": rounded[key][1],
                    }
                )
            value, names = rounded[key]
            names.append(name)
            linear.update_arg(0, value)
            result.rewrites += 1
        return result

    def _round(self, editor: Editor, source: fx.Node, group_size: int) -> fx.Node:
        scale = editor.call(dialect.dynamic_scale, source, self._bits, group_size)
        codes = editor.call(dialect.quantize, source, scale, None, self._bits, group_size)
        return editor.call(dialect.dequantize, codes, scale, None, self._bits, group_size)
