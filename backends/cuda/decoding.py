"""Texts that grow inside a program on the GPU; the cache stays there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qcompile.backends.cpu.decoding import PREFILL_CHUNK, FloatArray, IntArray, TokenBatch
from qcompile.manifest import Role, Signature

Run = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
"""Runs a program: one tensor per input, one per output."""


class GrowingDecoder:
    """A batch of texts in a program that returns its cache.

    Args:
        run: Runs the program.
        signature: Its inputs and outputs; a cache may be missing, then it decodes one chunk only.
        batch: Number of texts.
        device: Where the program runs.
    """

    def __init__(self, run: Run, signature: Signature, batch: int, device: torch.device) -> None:
        self._run = run
        self._signature = signature
        self._device = device
        self._mask = np.empty((batch, 0), np.int64)
        self._cache = {
            past.name: self._empty_cache(past.shape, past.dtype, batch)
            for past, _ in signature.cache_pairs()
        }
        self._successors = {present.name: past.name for past, present in signature.cache_pairs()}

    @property
    def length(self) -> int:
        """Tokens per row so far, padding included."""
        return self._mask.shape[1]

    def advance(self, input_ids: IntArray, mask: IntArray | None = None) -> FloatArray:
        """Append ``[batch, query]`` tokens; logits after the last, ``[batch, vocabulary]``."""
        for _, part in TokenBatch(input_ids, mask).chunks(PREFILL_CHUNK):
            logits = self.append(part, count=1)
        return logits[:, -1]

    def append(self, tokens: TokenBatch, *, count: int) -> FloatArray:
        """Append tokens in one run of the program.

        Args:
            tokens: What to append.
            count: Of how many last positions logits are needed.

        Returns:
            ``[batch, count or more, vocabulary]``.
        """
        query = tokens.ids.shape[1]
        new = np.ones_like(tokens.ids) if tokens.mask is None else tokens.mask
        self._mask = np.concatenate([self._mask, new], axis=1)
        positions = np.maximum(np.cumsum(self._mask, axis=1) - 1, 0)[:, -query:]
        values: dict[Role, IntArray] = {
            "input_ids": tokens.ids,
            "attention_mask": self._mask,
            "position_ids": positions if tokens.positions is None else tokens.positions,
            "token_type_ids": np.zeros_like(tokens.ids) if tokens.types is None else tokens.types,
            "logit_positions": np.arange(query - count, query),
        }
        inputs = [
            self._cache[value.name] if value.name in self._cache else self._put(values[value.role])
            for value in self._signature.inputs
        ]
        outputs = dict(
            zip((value.name for value in self._signature.outputs), self._run(inputs), strict=True)
        )
        for present, past in self._successors.items():
            self._cache[past] = outputs[present]
        logits = next(value for value in self._signature.outputs if value.role == "logits")
        return outputs[logits.name].float().cpu().numpy()

    def _put(self, array: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _empty_cache(self, shape: tuple[int | str, ...], dtype: str, batch: int) -> Tensor:
        """A cache that holds no token: its one symbolic axis but the batch is empty."""
        sizes = [size if isinstance(size, int) else 0 for size in shape[1:]]
        return torch.empty((batch, *sizes), dtype=getattr(torch, dtype), device=self._device)
