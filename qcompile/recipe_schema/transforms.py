"""Options of the steps that change bases: rotations, scales, permutations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from qcompile.errors import QCompileError
from qcompile.recipe_schema.values import (
    FLOAT,
    ActivationFormatOrFloat,
    IntegerActivations,
    Pattern,
    StepOptions,
    WeightFormat,
    WeightFormatOrFloat,
    complaint,
)


class Rotate(StepOptions):
    """Step ``rotate``: rotations spread outliers over all channels; the function stays the same.

    Attributes:
        residual: What rotates the residual stream: a randomized ``"hadamard"`` matrix, a random
            ``"orthogonal"`` one, or ``"none"``.
        value: The same for the values of each attention head.
        online: Where a Hadamard transform stays in the program: before the linear behind an
            activation (``"down_proj"``), before the one behind attention (``"o_proj"``), on queries
            and keys after their rotary embedding (``"query_key"``).
        seed: For signs and random matrices.
    """

    residual: Literal["hadamard", "orthogonal", "none"] = "hadamard"
    value: Literal["hadamard", "orthogonal", "none"] = "hadamard"
    online: tuple[Literal["down_proj", "o_proj", "query_key"], ...] = ("down_proj",)
    seed: int = 0


class Smooth(StepOptions):
    """Step ``smooth``: scales move outliers from activations into the weights that read them.

    Needs calibration data. Comes before ``rotate``, which takes away the gains that take up scales.

    Attributes:
        method: The rule that scales follow.
        strength: Its parameter (SmoothQuant's alpha, AWQ's exponent, the threshold of ``os+`` over
            the largest activation); None searches it for each site.
        weights: The format that the search rounds weights to: that of ``quantize_weights``.
        activations: What the search rounds activations to: as ``quantize_activations``, or
            ``"float"`` where these stay floats.
        granularity: Whether activations have a scale per ``"token"`` or per ``"tensor"``.
        online: Linears before which a ``rotate`` step behind this one leaves a Hadamard transform.
        ignore: Patterns on names of weights; what one of them reads is not scaled.
    """

    method: Literal["smoothquant", "awq", "os+", "preshift"] = "smoothquant"
    strength: float | None = Field(default=None, gt=0, lt=1)
    weights: WeightFormat = "int8"
    activations: ActivationFormatOrFloat = "int8"
    granularity: Literal["token", "tensor"] = "token"
    online: tuple[Literal["down_proj", "o_proj"], ...] = ()
    ignore: tuple[Pattern, ...] = ()

    @model_validator(mode="after")
    def _check_activations(self) -> Smooth:
        from qcompile.passes.transform import smooth  # pulls in torch

        try:
            smooth.Smooth(activations=self.activations)
        except QCompileError as error:
            raise complaint("format", error.message, error.remedy) from error
        return self


class Duquant(StepOptions):
    """Step ``duquant``: rotations in blocks and a permutation before linears, fit to their inputs.

    Needs calibration data. Scale channels first (step ``smooth``), as the paper does.

    Attributes:
        block_size: Channels per block at most; the largest divisor of an input's channels up to
            this is taken.
        steps: Greedy steps to try for each rotation.
        ignore: Patterns on names of weights whose inputs stay as they are.
        seed: For the free part of rotations.
    """

    block_size: int = Field(default=128, ge=2)
    steps: int = Field(default=256, ge=1)
    ignore: tuple[Pattern, ...] = ()
    seed: int = 0


class Spinquant(StepOptions):
    """Step ``spinquant``: rotations of the residual stream and of values, learned on the loss.

    Needs calibration data. Leave online Hadamard transforms by a ``rotate`` step before it.

    Attributes:
        bits: Width that activations are rounded to in training.
        weights: The format that weights are rounded to in training: that of ``quantize_weights``
            where it rounds to the nearest, ``"float"`` where its method looks at inputs.
        steps: Steps of one micro-batch each.
        rate: The largest step at the start; it falls along a cosine.
        batch_tokens: Tokens per micro-batch; a window is not cut.
        seed: For the Hadamard matrices that training starts from.
    """

    bits: int = Field(default=4, ge=2, le=8)
    weights: WeightFormatOrFloat = FLOAT
    steps: int = Field(default=100, ge=1)
    rate: float = Field(default=1.5, gt=0)
    batch_tokens: int = Field(default=2048, ge=2)
    seed: int = 0


class Resq(StepOptions):
    """Step ``resq``: directions of large variance become channels of their own, for more bits.

    Needs calibration data. Weights ``q`` become ``q.low`` and ``q.high``: give ``*.high`` more bits
    by ``overrides`` of ``quantize_weights`` and ``quantize_activations``.

    Attributes:
        fraction: Of the channels of each basis that form the high part.
        multiple: High parts of the residual stream are multiples of this.
        query_key: Whether queries and keys are turned into such a basis behind their rotary
            embedding, by nodes that stay.
        seed: For the rotations of each part.
    """

    fraction: float = Field(default=0.125, gt=0, lt=1)
    multiple: int = Field(default=8, ge=1)
    query_key: bool = False
    seed: int = 0


class Atq(StepOptions):
    """Step ``atq``: scales that keep the sum of both rounding errors of each layer small.

    Needs calibration data. Quantize weights by ``gptq`` behind it.

    Attributes:
        weights: The format that the search rounds weights to: that of ``quantize_weights``.
        activations: What the search rounds activations to, per token.
        ignore: Patterns on names of weights; what one of them reads is not scaled.
    """

    weights: WeightFormat = "int8"
    activations: IntegerActivations = "int8"
    ignore: tuple[Pattern, ...] = ()


class Rptq(StepOptions):
    """Step ``rptq``: channels of like ranges side by side, for ``quantize_clusters``.

    Needs calibration data.

    Attributes:
        clusters: Per input of linears, at most.
        head_clusters: Per head behind attention, at most.
        ignore: Patterns on names of weights whose inputs stay as they are.
    """

    clusters: int = Field(default=32, ge=1)
    head_clusters: int = Field(default=4, ge=1)
    ignore: tuple[Pattern, ...] = ()


class Quip(StepOptions):
    """Step ``quip``: random rotations on both sides of weights, which stay in the program.

    Attributes:
        rotation: A randomized ``"hadamard"`` transform, or the ``"kronecker"`` product of two
            random orthogonal matrices.
        rescale: Whether to balance the channels of inputs and weights, which needs calibration
            data.
        ignore: Patterns on names of weights that stay as they are.
        seed: For signs and random matrices.
    """

    rotation: Literal["hadamard", "kronecker"] = "hadamard"
    rescale: bool = True
    ignore: tuple[Pattern, ...] = ()
    seed: int = 0
