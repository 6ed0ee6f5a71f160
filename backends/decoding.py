"""Texts that grow inside a model, whatever runs it; needs no torch."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from qcompile.manifest import Role, Signature, ValueInfo

PREFILL_CHUNK = 512
"""Tokens per row that are run at once: bounds the memory that a long prompt needs."""

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Tokens for every row of a batch, each array ``[batch, query]`` int64.

    Attributes:
        ids: Token ids.
        mask: 0 where a token is padding; None means no padding.
        positions: Positions; None counts the real tokens of a row.
        types: Token type ids; None means 0.
    """

    ids: IntArray
    mask: IntArray | None = None
    positions: IntArray | None = None
    types: IntArray | None = None

    def chunks(self, size: int) -> Iterator[tuple[slice, TokenBatch]]:
        """The batch cut along the query axis, each part with the columns that it holds."""
        for start in range(0, self.ids.shape[1], size):
            columns = slice(start, min(start + size, self.ids.shape[1]))
            mask, positions, types = (
                None if array is None else array[:, columns]
                for array in (self.mask, self.positions, self.types)
            )
            yield columns, TokenBatch(self.ids[:, columns], mask, positions, types)


class Decoder(ABC):
    """A batch of texts inside a model."""

    def advance(self, input_ids: IntArray, mask: IntArray | None = None) -> FloatArray:
        """Append ``[batch, query]`` tokens; logits after the last, ``[batch, vocabulary]``."""
        for _, part in TokenBatch(input_ids, mask).chunks(PREFILL_CHUNK):
            logits = self.append(part, count=1)
        return logits[:, -1]

    def read(self, tokens: TokenBatch) -> FloatArray:
        """Append tokens; logits at each of them, ``[batch, query, vocabulary]``."""
        query = tokens.ids.shape[1]
        if query <= PREFILL_CHUNK:
            return self.append(tokens, count=query)
        logits = np.empty((0, 0, 0), np.float32)
        for columns, part in tokens.chunks(PREFILL_CHUNK):
            found = self.append(part, count=part.ids.shape[1])
            if not logits.size:
                logits = np.empty((found.shape[0], query, found.shape[2]), np.float32)
            logits[:, columns] = found
        return logits

    @abstractmethod
    def append(self, tokens: TokenBatch, *, count: int) -> FloatArray:
        """Append tokens in one run of the model.

        Args:
            tokens: What to append.
            count: Of how many last positions logits are needed.

        Returns:
            ``[batch, count or more, vocabulary]``; valid until the next call.
        """


class Engine(Protocol[Value]):
    """What runs a model, on values of its own kind."""

    def put(self, array: npt.NDArray[Any]) -> Value:
        """A value that holds an array."""

    def get(self, value: Value) -> npt.NDArray[Any]:
        """The array that a value holds."""

    def run(self, inputs: Sequence[Value]) -> Sequence[Value]:
        """Maps one value per input of the signature to one per output."""


class GrowingDecoder(Decoder, Generic[Value]):
    """Texts in a model that takes a cache and returns a longer one.

    Args:
        engine: Runs the model.
        signature: Its inputs and outputs; without a cache it can be appended to only once.
        batch: Number of texts.
    """

    def __init__(self, engine: Engine[Value], signature: Signature, batch: int) -> None:
        self._engine = engine
        self._signature = signature
        self._mask = np.empty((batch, 0), np.int64)
        self._successors = {past.name: present.name for past, present in signature.cache_pairs()}
        self._cache = {
            past.name: engine.put(empty_cache(past, batch)) for past, _ in signature.cache_pairs()
        }

    @property
    def length(self) -> int:
        """Tokens per row so far, padding included."""
        return self._mask.shape[1]

    def append(self, tokens: TokenBatch, *, count: int) -> FloatArray:
        """See `Decoder.append`."""
        new = np.ones_like(tokens.ids) if tokens.mask is None else tokens.mask
        self._mask = np.concatenate([self._mask, new], axis=1)
        values = language_inputs(tokens, self._mask, count)
        inputs = [
            self._cache[value.name]
            if value.name in self._cache
            else self._engine.put(np.ascontiguousarray(values[value.role], value.dtype))
            for value in self._signature.inputs
        ]
        names = [value.name for value in self._signature.outputs]
        outputs = dict(zip(names, self._engine.run(inputs), strict=True))
        self._cache = {past: outputs[present] for past, present in self._successors.items()}
        return self._engine.get(outputs[logits_of(self._signature).name])


class RecomputingDecoder(Decoder, Generic[Value]):
    """Texts in a model without a cache: every token runs the whole text again.

    Args:
        engine: Runs the model.
        signature: Its inputs and outputs.
        batch: Number of texts.
    """

    def __init__(self, engine: Engine[Value], signature: Signature, batch: int) -> None:
        self._engine = engine
        self._signature = signature
        self._ids = np.empty((batch, 0), np.int64)
        self._mask = np.empty((batch, 0), np.int64)

    def read(self, tokens: TokenBatch) -> FloatArray:
        """Logits at each of the tokens, which are a whole text: nothing may stand before them."""
        return self._run(tokens, tokens.ids.shape[1])

    def append(self, tokens: TokenBatch, *, count: int) -> FloatArray:
        """See `Decoder.append`; positions count the real tokens."""
        mask = np.ones_like(tokens.ids) if tokens.mask is None else tokens.mask
        self._ids = np.concatenate([self._ids, tokens.ids], axis=1)
        self._mask = np.concatenate([self._mask, mask], axis=1)
        return self._run(TokenBatch(self._ids, self._mask), count)

    def _run(self, tokens: TokenBatch, count: int) -> FloatArray:
        once = GrowingDecoder(self._engine, self._signature, len(tokens.ids))
        return once.append(tokens, count=count)


def language_inputs(tokens: TokenBatch, mask: IntArray, count: int) -> dict[Role, IntArray]:
    """What a language model reads beside its cache, by role.

    Args:
        tokens: The new tokens.
        mask: ``[batch, past + query]``: theirs and that of all before them.
        count: Of how many last positions logits are needed.
    """
    query = tokens.ids.shape[1]
    positions = tokens.positions
    if positions is None:
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -query:]
    return {
        "input_ids": tokens.ids,
        "attention_mask": mask,
        "position_ids": positions,
        "token_type_ids": np.zeros_like(tokens.ids) if tokens.types is None else tokens.types,
        "logit_positions": np.arange(query - count, query),
    }


def logits_of(signature: Signature) -> ValueInfo:
    """The output that holds the logits."""
    return next(value for value in signature.outputs if value.role == "logits")


def empty_cache(value: ValueInfo, batch: int) -> npt.NDArray[Any]:
    """A cache that holds no token: a state of zeros, or one whose symbolic axis is empty."""
    sizes = [size if isinstance(size, int) else 0 for size in value.shape[1:]]
    return np.zeros((batch, *sizes), value.dtype)
