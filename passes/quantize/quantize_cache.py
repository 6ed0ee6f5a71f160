"""Keys and values are kept in few bits."""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from qcompile.errors import RecipeError
from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.ir.types import Fact, Role
from qcompile.kernels.kv_append.rows import CACHE_FORMATS, FLOAT_CACHE, row_bytes
from qcompile.passes.infra import Context, Lossy, Numerics, Pass, PassResult, Skip


class QuantizeCache(Pass):
    """Gives every cache a format, to which new keys and values are rounded as they are appended.

    Before::

        %2 = qc.kv_append(%past_key_values.0.key, %1)

    After::

        %2 = qc.kv_append(%past_key_values.0.key, %1, int8, 64)

    Everything that attention reads has been rounded, the newest position too. Each cache leaves a
    record in the result's details: ``cache, role, layer, format, group_size, bits_per_value``.

    Args:
        format: One of `CACHE_FORMATS`, or ``"float"``.
        keys: Format of keys, where it is another one.
        values: Format of values, where it is another one.
        group_size: Numbers per scale along a head; 0, and what is not less than a head's width, is
            one scale per head and position.

    Raises:
        RecipeError: A format is unknown.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CACHE_OWNED})
    numerics: ClassVar[Numerics] = Lossy()

    def __init__(
        self,
        format: str = "int8",
        *,
        keys: str | None = None,
        values: str | None = None,
        group_size: int = 0,
    ) -> None:
        self._formats = {
            Role.PAST_KEY: _known(format if keys is None else keys),
            Role.PAST_VALUE: _known(format if values is None else values),
        }
        if group_size < 0:
            raise RecipeError(f"a group of {group_size} numbers", remedy="use 0 or more")
        self._group_size = group_size

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites every append."""
        del context
        result = PassResult()
        ports = zip(program.inputs, program.signature.inputs, strict=True)
        caches = {node: port for node, port in ports if port.role in self._formats}
        if not caches:
            result.skips.append(Skip(program.provenance.name, "the model keeps no cache"))
        for append in list(program.calls(dialect.kv_append)):
            past, new = append.args[:2]
            assert isinstance(past, fx.Node)
            if past not in caches:
                result.skips.append(Skip(append.name, "what it grows is no cache of the model"))
                continue
            port = caches[past]
            format = self._formats[port.role]
            if format == FLOAT_CACHE:
                continue
            width = int(append.meta["val"].shape[-1])
            group_size = self._group_size if self._group_size < width else 0
            append.args = (past, new, format, group_size)
            result.rewrites += 1
            result.details.append(
                {
                    "cache": port.name,
                    "role": port.role.value,
                    "layer": port.layer,
                    "format": format,
                    "group_size": group_size,
                    "bits_per_value": 8 * row_bytes(width, format, group_size) / width,
                }
            )
        return result


def _known(format: str) -> str:
    if format not in (FLOAT_CACHE, *CACHE_FORMATS):
        known = ", ".join((FLOAT_CACHE, *CACHE_FORMATS))
        raise RecipeError(f"caches cannot be '{format}'", remedy=f"known: {known}")
    return format
