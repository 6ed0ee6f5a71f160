"""What calibration can be asked for, and its answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx

from qcompile.calibration.statistics import Routed, Statistic
from qcompile.ir import dialect
from qcompile.ir.program import Program

S = TypeVar("S", bound=Statistic)

_LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class Routing:
    """Which experts see which rows of a value.

    Attributes:
        index: A node that yields the experts of each row, [T, C] int64.
        experts: How many there are.
    """

    index: fx.Node
    experts: int


@dataclass(frozen=True)
class Request:
    """A statistic that is wanted of a value.

    Attributes:
        value: A node that yields a floating tensor.
        statistic: Makes an empty statistic: a class such as `Hessian`, or a partial of one.
        channels: The axes that are channels, counted from the end; all others are rows.
        routing: If given, one statistic is collected for each expert, of the rows that it sees.
            The value is then [T, K], or [T, C, K] with a row for each choice.
    """

    value: fx.Node
    statistic: Callable[[], Statistic]
    channels: tuple[int, ...] = (-1,)
    routing: Routing | None = None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All values that have to be known."""
        return (self.value,) if self.routing is None else (self.value, self.routing.index)


@dataclass
class Statistics:
    """What was collected, by value.

    Attributes:
        inputs: For each weight of a linear, by name, the values that the linears multiply with it.
        collected: By name of the value, type of the statistic and channel axes.
        routed: By name of the value and type of the statistic: one for each expert.
    """

    inputs: Mapping[str, tuple[fx.Node, ...]] = field(default_factory=dict)
    collected: dict[tuple[str, type[Statistic], tuple[int, ...]], Statistic] = field(
        default_factory=dict
    )
    routed: dict[tuple[str, type[Statistic]], Routed] = field(default_factory=dict)

    def of(self, value: fx.Node, kind: type[S], channels: tuple[int, ...] = (-1,)) -> S:
        """The statistic of one kind of a value.

        Raises:
            KeyError: It was not requested.
        """
        return cast(S, self.collected[value.name, kind, channels])

    def of_experts(self, value: fx.Node, kind: type[S]) -> list[S]:
        """The statistics of one kind of the rows that each expert sees of a value.

        Raises:
            KeyError: They were not requested.
        """
        return cast("list[S]", self.routed[value.name, kind].parts)

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


def layer_requests(
    program: Program, statistic: Callable[[], Statistic]
) -> dict[str, tuple[Request, ...]]:
    """For each float weight of linears and routed experts, by name, what it is multiplied with.

    Experts are seen where they are two operators, `qc.expert_hidden` and `qc.expert_output`: what
    the second matrices read is no value of `qc.experts`.

    Args:
        program: The program.
        statistic: What is wanted of each value.
    """
    found = {
        name: tuple(Request(value, statistic) for value in values)
        for name, values in linear_inputs(program).items()
    }
    for call in program.calls(dialect.expert_hidden, dialect.expert_output):
        value, index = call.args[:2]
        weight = call.args[2 if call.target is dialect.expert_hidden else 3]
        assert isinstance(value, fx.Node)
        assert isinstance(index, fx.Node)
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            routing = Routing(index, int(weight.meta["val"].shape[0]))
            request = Request(value, statistic, routing=routing)
            name = str(weight.target)
            found[name] = tuple(dict.fromkeys((*found.get(name, ()), request)))
    return found


def empty_statistic(request: Request) -> Statistic | Routed:
    """What is requested, before anything was seen."""
    if request.routing is None:
        return request.statistic()
    return Routed(request.statistic, request.routing.experts)


def see(request: Request, env: Mapping[fx.Node, Any]) -> Statistic | Routed:
    """What one micro-batch has of a value.

    Args:
        request: What is wanted of which value.
        env: Values of the micro-batch.
    """
    seen, value = empty_statistic(request), env[request.value]
    if isinstance(seen, Routed):
        assert request.routing is not None
        seen.update(value.to(torch.float32), env[request.routing.index])
    else:
        seen.update(rows_of(value, request.channels))
    return seen


def rows_of(value: Tensor, channels: tuple[int, ...] = (-1,)) -> Tensor:
    """A value as float32 [rows, channels].

    Args:
        value: Any shape.
        channels: The axes that are channels; the others, in order, are rows.
    """
    axes = [axis % value.ndim for axis in channels]
    others = [axis for axis in range(value.ndim) if axis not in axes]
    if axes != list(range(value.ndim - len(axes), value.ndim)):
        value = value.permute(*others, *axes)
    width = math.prod(value.shape[len(others) :])
    return value.reshape(-1, width).to(torch.float32)
