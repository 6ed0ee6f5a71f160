"""Texts in a model whose sizes are fixed; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic

import numpy as np
import numpy.typing as npt

from qcompile.backends.decoding import (
    Decoder,
    Engine,
    FloatArray,
    TokenBatch,
    Value,
    language_inputs,
    logits_of,
)
from qcompile.errors import RecipeError
from qcompile.manifest import Signature, ValueInfo


class FixedDecoder(Decoder, Generic[Value]):
    """Texts in a model that takes just so many rows, new tokens and tokens of the past.

    The cache is filled from its end; what is not filled is masked. New tokens fewer than the model
    takes come after masked ones, which are taken out of the cache again. From a state nothing can
    be taken out, so that a model with states takes one token.

    Args:
        engine: Runs the model.
        signature: Its inputs and outputs, with a cache and all sizes fixed.
    """

    def __init__(self, engine: Engine[Value], signature: Signature) -> None:
        ids = signature.input("input_ids")
        assert ids is not None
        batch, self._query = (int(size) for size in ids.shape)
        self._engine = engine
        self._signature = signature
        self._pairs = signature.cache_pairs()
        self._axis, self._past = _cache_axis(self._pairs)
        self._mask = np.zeros((batch, self._past), np.int64)
        self._cache: dict[str, npt.NDArray[Any]] = {
            past.name: np.zeros([int(size) for size in past.shape], past.dtype)
            for past, _ in self._pairs
        }
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens per row so far, padding included."""
        return self._length

    def append(self, tokens: TokenBatch, *, count: int) -> FloatArray:
        """See `Decoder.append`.

        Raises:
            RecipeError: If the cache cannot hold what stands before the new tokens.
        """
        parts = [self._append(part) for _, part in tokens.chunks(self._query)]
        return np.concatenate(parts, axis=1)[:, -count:]

    def _append(self, tokens: TokenBatch) -> FloatArray:
        """Logits of up to as many tokens as the model takes."""
        if self._length > self._past:
            raise RecipeError(
                f"the text has {self._length} tokens; this model was compiled for {self._past} "
                "before the new ones",
                remedy="use a shorter text, or compile the model with a larger past",
            )
        new = tokens.ids.shape[1]
        fill = self._query - new
        mask = np.ones_like(tokens.ids) if tokens.mask is None else tokens.mask
        padded = TokenBatch(
            *(_pad_left(x, fill) for x in (tokens.ids, mask)),
            *(None if x is None else _pad_left(x, fill) for x in (tokens.positions, tokens.types)),
        )
        total = np.concatenate([self._mask, _pad_left(mask, fill)], axis=1)
        values = language_inputs(padded, total, self._query)
        inputs = [
            self._cache[value.name]
            if value.name in self._cache
            else np.ascontiguousarray(values[value.role], value.dtype)
            for value in self._signature.inputs
        ]
        made = self._engine.run([self._engine.put(array) for array in inputs])
        names = [value.name for value in self._signature.outputs]
        outputs = dict(zip(names, map(self._engine.get, made), strict=True))
        self._keep(outputs, total, new)
        return outputs[logits_of(self._signature).name][:, fill:]

    def _keep(
        self, outputs: dict[str, npt.NDArray[Any]], mask: npt.NDArray[np.int64], new: int
    ) -> None:
        """The last tokens, without those that only filled the input."""
        columns = np.arange(self._past + self._query)
        kept = np.r_[columns[: self._past], columns[len(columns) - new :]][-self._past :]
        self._mask = mask[:, kept]
        for past, present in self._pairs:
            made = outputs[present.name]
            taken = made if past.is_state else np.take(made, kept, axis=self._axis)
            self._cache[past.name] = np.ascontiguousarray(taken)
        self._length += new


def is_fixed(signature: Signature) -> bool:
    """Whether all inputs of a model with a cache have fixed sizes."""
    return all(isinstance(size, int) for value in signature.inputs for size in value.shape)


def _cache_axis(pairs: Sequence[tuple[ValueInfo, ValueInfo]]) -> tuple[int, int]:
    """The axis along which keys and values grow, and its size before."""
    past, present = next(pair for pair in pairs if not pair[0].is_state)
    axis = next(i for i, size in enumerate(past.shape) if size != present.shape[i])
    return axis, int(past.shape[axis])


def _pad_left(array: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    return np.pad(array, ((0, 0), (count, 0)))
