"""What a budget leaves open, known before anything is measured."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from qcompile.calibration.settings import parse_bytes
from qcompile.errors import RecipeError
from qcompile.formats import Format, IntegerFormat, LookupFormat, VectorFormat, parse_format
from qcompile.ir.program import Program
from qcompile.passes.quantize.allocation.choose import choose
from qcompile.passes.quantize.bits import count_bits
from qcompile.passes.quantize.layers import LayerWeight, Part, layer_weights
from qcompile.passes.quantize.policy import FormatPolicy, Override, matches_any

_WIDTHS = (2, 3, 4, 5, 6, 8)
_GRIDS = ("higgs4x256", "higgs2x32", "higgs2x64", "higgs2x128", "higgs2x256", "higgs1x32")
_INNER = ({Part.LINEAR}, {Part.EXPERTS})


class BudgetOptions(Protocol):
    """The options of `quantize_weights` that say what is open; see there."""

    @property
    def format(self) -> str:
        """Of all weights that nothing else names."""

    @property
    def ignore(self) -> Sequence[str]:
        """Patterns on names of weights that stay float."""

    @property
    def embedding(self) -> str | None:
        """Format of the token embedding."""

    @property
    def lm_head(self) -> str | None:
        """Format of the output projection."""

    @property
    def overrides(self) -> Sequence[Override]:
        """Formats by pattern."""

    @property
    def target_bits(self) -> float | None:
        """Bits per weight."""

    @property
    def target_size(self) -> int | str | None:
        """Bytes of all weights."""

    @property
    def candidates(self) -> Sequence[str]:
        """Formats to choose from."""


@dataclass(frozen=True)
class Budget:
    """What weights may take.

    Attributes:
        bits: Per weight, over the weights that formats are chosen for; None: `size` counts.
        size: Bytes of all stored weights of the program together, embeddings and what stays float
            included; None: `bits` counts.
    """

    bits: float | None = None
    size: int | None = None

    @staticmethod
    def of(target_bits: float | None, target_size: int | str | None) -> Budget | None:
        """A budget from the words of a recipe; None if there is none.

        Raises:
            DataError: The size is no amount of memory.
        """
        if target_bits is None and target_size is None:
            return None
        return Budget(target_bits, None if target_size is None else parse_bytes(target_size))

    def total(self, program: Program, names: Iterable[str], policy: FormatPolicy) -> float:
        """The budget for some weights, in bits.

        Args:
            program: Float.
            names: The weights that are open.
            policy: What becomes of the others.
        """
        wanted = set(names)
        if self.bits is not None:
            return self.bits * sum(program.weights.spec(name).elements for name in wanted)
        assert self.size is not None
        return self.size * 8 - _other_bits(program, wanted, policy)

    def __str__(self) -> str:
        return f"{self.bits:g} bits" if self.bits is not None else f"{self.size:,} bytes"


def candidate_formats(
    format: str | Format, candidates: Iterable[str | Format]
) -> tuple[Format, ...]:
    """What weights may become: what the recipe names, or else a format's family by width.

    Raises:
        RecipeError: A name means nothing, or a format has no such family.
    """
    named = tuple(parse_format(c) if isinstance(c, str) else c for c in candidates)
    return named or _family(parse_format(format) if isinstance(format, str) else format)


def open_weights(
    weights: Iterable[LayerWeight],
    ignore: Iterable[str],
    overrides: Iterable[Override | Mapping[str, str]],
) -> list[LayerWeight]:
    """Weights that a recipe gives its common format, and a budget may give another one."""
    fixed = [*ignore, *(o["match"] if isinstance(o, Mapping) else o.match for o in overrides)]
    return [w for w in weights if w.parts in _INNER and not matches_any(fixed, w.name)]


def as_overrides(formats: Mapping[str, Format]) -> list[dict[str, str]]:
    """Formats of weights as `QuantizeWeights` takes them."""
    return [{"match": glob.escape(name), "format": str(f)} for name, f in formats.items()]


def stand_ins(program: Program, options: BudgetOptions) -> list[dict[str, str]]:
    """Overrides that bring a planned program near its budget, as if all weights were alike.

    Empty where there is no budget. Where even the smallest candidates are too large those stand.
    """
    budget = Budget.of(options.target_bits, options.target_size)
    if budget is None:
        return []
    candidates = candidate_formats(options.format, options.candidates)
    found = open_weights(layer_weights(program)[0], options.ignore, options.overrides)
    shapes = {weight.name: program.weights.spec(weight.name).shape for weight in found}
    policy = FormatPolicy.of(
        options.format,
        embedding=options.embedding,
        lm_head=options.lm_head,
        ignore=options.ignore,
        overrides=options.overrides,
    )
    costs = [[c.stored_bits(shape) for c in candidates] for shape in shapes.values()]
    # Four times the error for every bit less.
    losses = [
        [w * 4.0 ** -(cost / w) for cost in item]
        for w, item in zip(map(math.prod, shapes.values()), costs, strict=True)
    ]
    allowed = max(int(budget.total(program, shapes, policy)), sum(map(min, costs)))
    chosen = choose(costs, losses, allowed)
    return as_overrides({name: candidates[i] for name, i in zip(shapes, chosen, strict=True)})


def _family(format: Format) -> tuple[Format, ...]:
    if isinstance(format, IntegerFormat):
        return tuple(replace(format, bits=bits) for bits in _WIDTHS)
    if isinstance(format, VectorFormat):
        return tuple(replace(format, codebook=grid) for grid in _GRIDS)
    if isinstance(format, LookupFormat):
        others = (IntegerFormat(bits, format.group_size) for bits in _WIDTHS if bits != 4)
        return (format, *others)
    raise RecipeError(
        f"a budget with format {format} needs to know what else weights may become",
        remedy="name candidates: [int2-g64, int4-g64, ...]",
    )


def _other_bits(program: Program, names: set[str], policy: FormatPolicy) -> int:
    """Bits that all weights but some will take."""
    formats = {w.name: policy.decide(w).format for w in layer_weights(program)[0]}
    total = 0
    for tensor in count_bits(program).tensors:
        if tensor.name not in names:
            format = formats.get(tensor.name)
            total += tensor.bits if format is None else format.stored_bits(tensor.shape)
    return total
