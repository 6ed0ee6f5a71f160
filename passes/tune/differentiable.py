"""A program's loss with rounded activations, differentiable by what its weights are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional

from qcompile.errors import ModelError
from qcompile.formats import Format
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.ir.types import Role
from qcompile.kernels.quantize.reference import dynamic_scale
from qcompile.passes.quantize.layers import LINEAR, output_projection
from qcompile.passes.tune.fake_quantize import straight_through

_TINY = 1e-30
"""In place of 0 as a divisor, where a row has nothing to round."""

Weights = Callable[[str, Tensor], Tensor]
"""Makes of a weight's name and its numbers what the program computes with."""


class RoundedRun(Interpreter):
    """Interprets a program with the inputs of its linears rounded per token, under autograd.

    The input of the linear that makes the logits is not rounded.

    Args:
        program: What to run.
        bits: Width of activations.
        weights: What becomes of each weight.
        cache: Weights already materialized, shared between runs.
    """

    def __init__(
        self, program: Program, bits: int, weights: Weights, cache: dict[str, Tensor]
    ) -> None:
        super().__init__(program, cache=cache)
        self._bits = bits
        self._weights = weights
        self._rounded = set(inner_linears(program))

    def run_node(self, n: fx.Node) -> object:
        """The value of one node, with its derivative."""
        with torch.enable_grad():
            return super().run_node(n)

    def fetch_args_kwargs_from_env(
        self, n: fx.Node
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """A node's arguments; the first one of a linear is rounded."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if n in self._rounded:
            args = (round_straight_through(args[0], self._bits), *args[1:])
        return args, kwargs

    def get_attr(self, target: object, args: object, kwargs: object) -> Tensor:
        """A weight, as it is computed with."""
        return self._weights(str(target), super().get_attr(target, args, kwargs))


def inner_linears(program: Program) -> list[fx.Node]:
    """All linears but the one that makes the logits."""
    head = output_projection(program)
    return [linear for linear in program.calls(LINEAR) if linear is not head]


def round_weight_straight_through(weight: Tensor, format: Format) -> Tensor:
    """What a weight decodes to, whose derivative is the weight's.

    Errors grow with the largest magnitude of their row, and have the derivative that follows: what
    makes a row's range smaller makes its errors smaller.

    Args:
        weight: ``[N, K]`` floating.
        format: Of its codes, which are the nearest.
    """
    plain = weight.detach().to(torch.float32)
    error = (format.decode(format.encode(plain, name="weight")) - plain).to(weight.dtype)
    reach = weight.abs().amax(dim=-1, keepdim=True)
    return weight + error * (reach / reach.detach().clamp(min=_TINY))


def round_straight_through(x: Tensor, bits: int) -> Tensor:
    """Symmetric rounding with one scale per token, whose steps pass gradients on as they are.

    Scales have their true derivative: what makes the largest channel of a token smaller makes all
    of its errors smaller.

    Args:
        x: ``[..., K]`` floating.
        bits: Width of the codes.
    """
    scale = dynamic_scale(x, bits, 0)
    steps = x / scale
    return straight_through(steps, steps.detach().round()) * scale


def next_token_loss(program: Program, run: Interpreter, inputs: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy of the tokens that follow, in nats.

    Args:
        program: A language model.
        run: Interprets it.
        inputs: One tensor per placeholder; tokens that are padding count neither as predicted nor
            as predicting.

    Raises:
        ModelError: The program does not map tokens to logits.
    """
    signature = program.signature
    if not (signature.has(Role.INPUT_IDS) and signature.has(Role.LOGITS)):
        raise ModelError(
            f"'{program.provenance.name}' does not map tokens to logits, so it has no loss",
            remedy="use a method that does not train, such as rotate",
        )
    given = dict(zip((port.role for port in signature.inputs), inputs, strict=True))
    outputs = run.run(*inputs)
    roles = [port.role for port in signature.outputs]
    logits, tokens = outputs[roles.index(Role.LOGITS)][:, :-1], given[Role.INPUT_IDS][:, 1:]
    mask = given.get(Role.ATTENTION_MASK)
    if mask is not None:
        real = mask[:, -tokens.shape[1] - 1 :].to(torch.bool)
        kept = real[:, 1:] & real[:, :-1]
        logits, tokens = logits[kept], tokens[kept]
    return functional.cross_entropy(logits.flatten(0, -2), tokens.flatten())
