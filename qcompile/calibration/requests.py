"""What calibration can be asked for, and its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import fx

from qcompile.calibration.statistics import Statistic
from qcompile.ir.program import Program

S = TypeVar("S", bound=Statistic)

_LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class Request:
    """A statistic that is wanted of a value.

    Attributes:
        value: A node that yields a floating tensor.
        statistic: Makes an empty statistic: a class such as `Hessian`, or a partial of one.
        channels: The axes that are channels, counted from the end; all others are rows.
    """

    value: fx.Node
    statistic: Callable[[], Statistic]
    channels: tuple[int, ...] = (-1,)


@dataclass
class Statistics:
    """What was collected, by value.

    Attributes:
        inputs: For each weight of a linear, by name, the values that the linears multiply with it.
        collected: By name of the value, type of the statistic and channel axes.
    """

    inputs: Mapping[str, tuple[fx.Node, ...]] = field(default_factory=dict)
    collected: dict[tuple[str, type[Statistic], tuple[int, ...]], Statistic] = field(
        default_factory=dict
    )

    def of(self, value: fx.Node, kind: type[S], channels: tuple[int, ...] = (-1,)) -> S:
        """The statistic of one kind of a value.

        Raises:
            KeyError: It was not requested.
        """
        return cast(S, self.collected[value.name, kind, channels])

    def of_weight(self, name: str, kind: type[S]) -> S:
        """The statistic of what is multiplied with a weight, by the weight's name.

        Linears that read the same value share it; where several linears with different inputs
        share the weight, their statistics are added.

        Raises:
            KeyError: It was not requested, or no linear has this weight.
        """
        first, *others = self.inputs[name]
        if not others:
            return self.of(first, kind)
        total = kind()
        for value in (first, *others):
            total.merge(self.of(value, kind))
        return total


def linear_inputs(program: Program) -> dict[str, tuple[fx.Node, ...]]:
    """For each float weight of a linear, by name, the values that it is multiplied with.

    Linears that share an input (query, key and value; gate and up) name the same node.
    """
    found: dict[str, dict[fx.Node, None]] = {}
    for linear in program.calls(_LINEAR):
        value, weight = linear.args[0], linear.args[1]
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and isinstance(value, fx.Node):
            found.setdefault(str(weight.target), {})[value] = None
    return {name: tuple(values) for name, values in found.items()}
