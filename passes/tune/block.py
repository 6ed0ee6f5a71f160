"""A block of a program as a function of what is learned of its weights, with its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional

from qcompile.calibration.parallel import fast_products, ordered_map
from qcompile.calibration.part import Piece, compute_node
from qcompile.calibration.stream import Stream
from qcompile.formats import QuantizedWeight
from qcompile.passes.quantize.layers import LINEAR
from qcompile.passes.quantize.methods.block import Learnable, WeightLearner
from qcompile.passes.tune.differentiable import round_straight_through
from qcompile.passes.tune.narrow_products import has_narrow_products, narrow_linear
from qcompile.passes.tune.site_scales import ScaledWeights


class LearnedWeights:
    """What the weights of a block are at present.

    Args:
        weights: The float weights, float32, by name.
        learners: What is learned of those that become codes.
        scaled: What the scales of sites make of weights first.

    Attributes:
        weights: The float weights.
        names: Their names.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        learners: Mapping[str, WeightLearner],
        scaled: ScaledWeights,
    ) -> None:
        self.weights = weights
        self._learners = learners
        self._scaled = scaled
        self.names = list(weights)

    @property
    def learnables(self) -> list[Learnable]:
        """All of them, in a fixed order."""
        return list(dict.fromkeys(each for name in self.names for each in self.learnables_of(name)))

    def learnables_of(self, name: str) -> list[Learnable]:
        """What one weight depends on."""
        own = self._learners[name].learnables if name in self._learners else ()
        return [*own, *self._scaled.learnables(name)]

    def value(self, name: str) -> Tensor:
        """What the block computes with, differentiable."""
        weight = self._scaled.apply(name, self.weights[name])
        learner = self._learners.get(name)
        return weight if learner is None else learner.decode(weight)

    def finish(self, name: str) -> tuple[Tensor, QuantizedWeight]:
        """A weight as scales have changed it, float32, and the codes that stand for it."""
        weight = self._scaled.final(name, self.weights[name])
        return weight, self._learners[name].finish(weight)


class Block:
    """The mean squared difference of a block's output from what the float model computes there.

    A micro-batch runs on one thread, and gradients are added up in order: results do not depend on
    the number of threads. Linears multiply bfloat16 numbers where the CPU does that faster: what
    rounding them adds to the difference is small beside what rounding to 4 bits does.

    Args:
        piece: The block.
        inputs: Where its inputs are: the model as it is quantized so far.
        targets: Where its output is: the float model.
        output: Its value.
        weights: What is learned.
        activation_bits: Width that the inputs of its linears are rounded to, per token; or 0.
    """

    def __init__(
        self,
        piece: Piece,
        inputs: Stream,
        targets: Stream,
        output: fx.Node,
        weights: LearnedWeights,
        activation_bits: int = 0,
    ) -> None:
        self._piece = piece
        self._inputs = inputs
        self._targets = targets
        self._output = output
        self._weights = weights
        self._bits = activation_bits
        self._product = narrow_linear if has_narrow_products() else functional.linear
        self.batches = inputs.batches
        self.learnables = weights.learnables

    def energy(self) -> float:
        """Mean square of the target, over all micro-batches."""

        def square(batch: int) -> float:
            target = self._targets.value(batch, self._output)
            return float(target.square().mean(dtype=torch.float64))

        return sum(ordered_map(square, range(self.batches))) / self.batches

    def losses(self) -> list[float]:
        """The difference on each micro-batch."""
        values = {name: self._weights.value(name).detach() for name in self._weights.names}

        def loss(batch: int) -> float:
            return float(self._loss(batch, values))

        with fast_products():
            return list(ordered_map(loss, range(self.batches)))

    def gradients(self, batches: Sequence[int]) -> tuple[list[float], list[Tensor]]:
        """The differences on some micro-batches, and the gradient of their sum by `learnables`."""
        names = self._weights.names

        def value(name: str) -> Tensor:
            with torch.enable_grad():
                return self._weights.value(name)

        values = dict(zip(names, ordered_map(value, names), strict=True))
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}

        def differentiate(batch: int) -> tuple[float, tuple[Tensor, ...]]:
            with torch.enable_grad():
                loss = self._loss(batch, leaves)
            found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            return float(loss), found

        losses: list[float] = []
        totals = {name: torch.zeros_like(value) for name, value in values.items()}
        with fast_products():
            for loss, parts in ordered_map(differentiate, batches):
                losses.append(loss)
                for name, part in zip(names, parts, strict=True):
                    totals[name] += part

        def pull(name: str) -> list[Tensor]:
            own = [each.value for each in self._weights.learnables_of(name)]
            return list(torch.autograd.grad(values[name], own, totals[name])) if own else []

        return losses, self._add_up(names, list(ordered_map(pull, names)))

    def _add_up(self, names: Sequence[str], parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The gradient by each learnable: several weights may depend on one."""
        sums: dict[Learnable, Tensor] = {}
        for name, gradients in zip(names, parts, strict=True):
            for each, gradient in zip(self._weights.learnables_of(name), gradients, strict=True):
                sums[each] = sums[each] + gradient if each in sums else gradient
        return [sums[each] for each in self.learnables]

    def _loss(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        env: dict[fx.Node, Any] = {
            node: weights.get(str(node.target), value) if node.op == "get_attr" else value
            for node, value in self._piece.constants.items()
        }
        env |= {node: self._inputs.value(batch, node) for node in self._piece.reads}
        for node in self._piece.nodes:
            env[node] = (
                self._linear(node, env) if node.target == LINEAR else compute_node(node, env)
            )
        difference: Tensor = env[self._output] - self._targets.value(batch, self._output)
        return difference.square().mean()

    def _linear(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Tensor:
        """The value of a linear, its input rounded where activations will be."""
        x, weight, *bias = cast(tuple[Tensor, ...], fx.node.map_arg(node.args, env.__getitem__))
        if self._bits:
            x = round_straight_through(x, self._bits)
        return self._product(x, weight, *bias)
