"""Codes of a vector codebook, times scales, in a turned basis: HIGGS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.errors import RecipeError
from qcompile.formats.base import Format, QuantizedWeight, StoredWeight
from qcompile.formats.grid import ScaleSearch, require_finite, storable_scale
from qcompile.formats.nearest_vector import nearest_vectors
from qcompile.formats.row_blocks import map_row_blocks
from qcompile.formats.scales import SCALE_DTYPES
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.hadamard.matrix import largest_block
from qcompile.kernels.lookup_vectors.codebooks import Codebook, codebook
from qcompile.kernels.lookup_vectors.reference import codebook_tensor, lookup_vectors, turn
from qcompile.kernels.quantize.groups import group_count, split_groups

_REFITS = 3
"""Rounds of choosing codes and scales in turn, where scales are searched."""


@dataclass(frozen=True)
class VectorFormat(Format):
    """A code for every few weights side by side: a vector of a codebook, times the group's scale.

    Codebooks are made for normal numbers of variance 1. A randomized Hadamard transform of the
    input axis makes weights of any distribution look so, and the scale of a group is their root
    mean square. Decoded weights are turned back; where a target can, it turns the inputs instead
    (`qcompile.passes.lower.turn_inputs`).

    Attributes:
        codebook: Name; see `qcompile.kernels.lookup_vectors.codebooks`.
        group_size: Weights that share a scale, along the last axis; the last group of a row may be
            short. 0 is one group per row (per output channel). Blocks of the Hadamard transform lie
            within groups, and are as large as matrices of their order are known.
        scale_dtype: float16, bfloat16 or float32. Codes are chosen for the stored scales.
        turned: Whether weights are transformed; without, they should have been rotated before.

    Raises:
        RecipeError: A field is out of its range, or vectors would reach into two groups.

    Source: Malinovskii et al. 2024, "Pushing the Limits of Large Language Model Quantization via
    the Linearity Theorem" (HIGGS, arXiv 2411.17525), section 4.
    """

    codebook: str
    group_size: int = 0
    scale_dtype: torch.dtype = torch.float16
    turned: bool = True

    def __post_init__(self) -> None:
        try:
            codebook(self.codebook)
        except ValueError as error:
            raise RecipeError(str(error), remedy="write a format such as higgs2x256-g64") from error
        if self.group_size < 0 or self.group_size % self.dimension:
            raise RecipeError(
                f"a group of {self.group_size} weights does not hold whole vectors of "
                f"{self.dimension}",
                remedy="write a format such as higgs2x256-g64",
            )

    @property
    def name(self) -> str:
        """Such as ``higgs2x256-g64``; what is left out is per row, fp16, turned."""
        parts = [self.codebook]
        if self.group_size:
            parts.append(f"g{self.group_size}")
        if self.scale_dtype != torch.float16:
            parts.append(next(n for n, dtype in SCALE_DTYPES.items() if dtype == self.scale_dtype))
        if not self.turned:
            parts.append("unturned")
        return "-".join(parts)

    @property
    def vectors(self) -> Codebook:
        """The vector of each code."""
        return codebook(self.codebook)

    @property
    def dimension(self) -> int:
        """Weights per code."""
        return len(self.vectors[0])

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return (len(self.vectors) - 1).bit_length()

    def block(self, width: int) -> int:
        """Order of the Hadamard matrices for weights [..., width]; 0 if they are not turned."""
        if not self.turned:
            return 0
        return largest_block(math.gcd(width, self.group_size) if self.group_size else width)

    def encode(
        self, weight: Tensor, *, scale_search: ScaleSearch = "absmax", name: str = "weight"
    ) -> QuantizedWeight:
        """Turns a weight and rounds it to the nearest vectors; see `Format.encode`.

        Args:
            weight: [..., K], any float dtype.
            scale_search: ``"absmax"`` takes the root mean square of each group. The others improve
                on it: codes and least-squares scales are chosen in turn.
            name: What error messages call the weight.

        Raises:
            ModelError: The weight is not finite, or a scale is too large for its type.
        """
        rows = weight.reshape(-1, weight.shape[-1])
        codes = torch.empty((len(rows), self._code_count(rows.shape[1], name)), dtype=torch.uint8)

        def encode_block(start: int, stop: int) -> Tensor:
            values = rows[start:stop].to(torch.float32)
            require_finite(values, name)
            chosen, scale = self._fit(self._turn(values), scale_search, name)
            codes[start:stop] = chosen
            return scale

        scale = torch.cat(map_row_blocks(encode_block, *rows.shape))
        leading = weight.shape[:-1]
        tensors = {
            "codes": codes.reshape(*leading, -1),
            "scale": scale.to(self.scale_dtype).reshape(*leading, -1),
        }
        return QuantizedWeight(self, tuple(weight.shape), tensors)

    def fit_scales(self, rows: Tensor, search: ScaleSearch, name: str) -> Tensor:
        """The scales that `encode` takes, as they are stored.

        Args:
            rows: In the basis of the codebook, float32 [n, K], or a group of these, [n, g].
            search: See `encode`.
            name: What error messages call the weight.

        Returns:
            float32 [n, G].

        Raises:
            ModelError: A scale is too large for its type.
        """
        return self._fit(rows, search, name)[1]

    def decode(self, quantized: QuantizedWeight) -> Tensor:
        """The stored values, float32 [..., K], turned back."""
        codes, scale = quantized.tensors["codes"], quantized.tensors["scale"]
        block = self.block(quantized.shape[-1])
        return lookup_vectors(codes, scale, self.codebook, self.group_size, block)

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Codes [..., K / dimension] uint8 and one scale per group [..., G].

        Raises:
            RecipeError: The weight's rows do not hold whole vectors.
        """
        grouped = (*shape[:-1], group_count(shape[-1], self.group_size))
        return {
            "codes": TensorSpec((*shape[:-1], self._code_count(shape[-1])), torch.uint8),
            "scale": TensorSpec(grouped, self.scale_dtype),
        }

    def bits_by_part(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Codes and scales. The codebook has a name, and the signs follow from the shape."""
        specs = self.tensors(shape)
        return {
            "codes": specs["codes"].elements * self.code_bits,
            "scale": specs["scale"].bytes * 8,
        }

    def emit(self, editor: Editor, tensors: Mapping[str, fx.Node]) -> fx.Node:
        """One `qc.lookup_vectors`."""
        codes, scale = tensors["codes"], tensors["scale"]
        block = self.block(int(codes.meta["val"].shape[-1]) * self.dimension)
        return editor.call(
            dialect.lookup_vectors, codes, scale, self.codebook, self.group_size, block
        )

    @classmethod
    def recognize(cls, node: fx.Node) -> StoredWeight | None:
        """The weight that a `qc.lookup_vectors` of stored codes decodes."""
        if node.target != dialect.lookup_vectors:
            return None
        codes, scale, name, group_size, block = node.args
        assert isinstance(codes, fx.Node)
        assert isinstance(scale, fx.Node)
        assert isinstance(name, str)
        assert isinstance(group_size, int)
        if codes.op != "get_attr" or scale.op != "get_attr":
            return None
        format = cls(name, group_size, scale.meta["val"].dtype, turned=bool(block))
        return StoredWeight(format, {"codes": codes, "scale": scale}, node)

    def _code_count(self, width: int, name: str = "weight") -> int:
        if width % self.dimension:
            raise RecipeError(
                f"the {width} inputs of '{name}' do not make whole vectors of {self.dimension}",
                remedy="use another format for it, such as int4-g64",
            )
        return width // self.dimension

    def _fit(self, values: Tensor, search: ScaleSearch, name: str) -> tuple[Tensor, Tensor]:
        """Codes [n, K / dimension] and scales [n, G] of turned rows [n, K]."""
        groups = split_groups(values, self.group_size)
        energy = split_groups(torch.ones_like(values[:1]), self.group_size).sum(-1)
        norm = groups.square().sum(-1)
        scale = storable_scale((norm / energy).sqrt(), self.scale_dtype, name)
        codes, error = self._choose(groups, scale)
        for _ in range(0 if search == "absmax" else _REFITS):
            table = codebook_tensor(self.codebook)
            decoded = table[codes.long()].reshape(groups.shape)
            best = (groups * decoded).sum(-1) / decoded.square().sum(-1).clamp_(min=1e-30)
            refit = storable_scale(best.clamp(min=0), self.scale_dtype, name)
            chosen, lower = self._choose(groups, refit)
            better = lower < error
            scale, error = torch.where(better, refit, scale), torch.where(better, lower, error)
            codes = torch.where(better.unsqueeze(-1), chosen, codes)
        return codes.flatten(-2)[:, : values.shape[1] // self.dimension], scale

    def _choose(self, groups: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [n, G, g / dimension] of groups [n, G, g], and squared errors [n, G]."""
        vectors = (groups / scale.unsqueeze(-1)).unflatten(-1, (-1, self.dimension))
        codes, distance = nearest_vectors(vectors, codebook_tensor(self.codebook))
        return codes, distance.sum(-1) * scale.square()

    def _turn(self, rows: Tensor) -> Tensor:
        block = self.block(rows.shape[1])
        return turn(rows, block) if block else rows
