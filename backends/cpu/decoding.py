"""The decoder of the CPU target: a batch of texts that grows inside a model, in place.

`CachedDecoder` owns the buffers of the cache. Those of keys and values are an input *and* the
matching output of the model, so that attention appends to them in place; they are bound again when
they grow, which is rare. A state of fixed size has two buffers that change places with every call,
since the model may write the new one before it has read all of the old one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from qcompile.backends.decoding import (
    Decoder,
    FloatArray,
    TokenBatch,
    empty_cache,
    logits_of,
)
from qcompile.backends.onnx.run_errors import naming_failures
from qcompile.manifest import Role, Signature, ValueInfo

_CAPACITY_STEP = 64


class CachedDecoder(Decoder):
    """Texts in a model with a key/value cache.

    Args:
        runtime: The loaded model.
        signature: Its inputs and outputs.
        batch: Number of texts.
        capacity: Tokens per text that are expected; more will grow the cache.
    """

    def __init__(
        self,
        runtime: onnxruntime.InferenceSession,
        signature: Signature,
        batch: int,
        capacity: int,
    ) -> None:
        self._runtime = runtime
        self._binding = runtime.io_binding()
        self._inputs = {value.role: value for value in signature.inputs}
        self._pairs = [pair for pair in signature.cache_pairs() if not pair[0].is_state]
        self._states = [
            _State(past.name, present.name, empty_cache(past, batch))
            for past, present in signature.cache_pairs()
            if past.is_state
        ]
        self._logits = logits_of(signature)
        self._buffers: dict[str, npt.NDArray[Any]] = {}
        self._batch = batch
        self._length = 0
        self._capacity = 0
        # Written once per token; a column is 0 where a row was fed padding.
        self._mask = np.empty((batch, 0), np.int64)
        self._real_tokens = np.zeros((batch, 1), np.int64)
        self._reserve(capacity)

    @property
    def length(self) -> int:
        """Tokens per row so far, padding included."""
        return self._length

    @property
    def capacity(self) -> int:
        """Tokens per row that fit before the cache must grow."""
        return self._capacity

    def append(self, tokens: TokenBatch, *, count: int) -> FloatArray:
        """See `Decoder.append`; the logits are overwritten by the next call."""
        query = tokens.ids.shape[1]
        total = self._length + query
        self._reserve(total)
        self._mask[:, self._length : total] = 1 if tokens.mask is None else tokens.mask
        counted = self._real_tokens + np.cumsum(self._mask[:, self._length : total], axis=1)
        self._real_tokens = counted[:, -1:]
        positions = tokens.positions
        self._feed("input_ids", tokens.ids)
        self._feed("attention_mask", self._mask[:, :total])
        self._feed("position_ids", np.maximum(counted - 1, 0) if positions is None else positions)
        if "token_type_ids" in self._inputs:
            types = tokens.types
            self._feed("token_type_ids", np.zeros_like(tokens.ids) if types is None else types)
        self._feed("logit_positions", np.arange(query - count, query))
        logits = self._logits_buffer(count if "logit_positions" in self._inputs else query)
        for state in self._states:
            self._bind_input(state.past, state.held)
            self._bind_output(state.present, state.next)
        with naming_failures():
            self._runtime.run_with_iobinding(self._binding)
        for state in self._states:
            state.turn()
        self._length = total
        return logits

    def _feed(self, role: Role, array: npt.NDArray[Any]) -> None:
        """Copy a small input where the model reads it, if it has such an input."""
        value = self._inputs.get(role)
        if value is None:
            return
        held = self._buffers.get(value.name)
        if held is not None and held.shape == array.shape:
            np.copyto(held, array)
            return
        held = np.array(array, dtype=value.dtype, order="C")
        self._buffers[value.name] = held
        self._bind_input(value.name, held)

    def _logits_buffer(self, count: int) -> FloatArray:
        shape = (self._batch, count, *_sizes(self._logits.shape[2:]))
        held = self._buffers.get(self._logits.name)
        if held is None or held.shape != shape:
            held = np.empty(shape, np.dtype(self._logits.dtype))
            self._buffers[self._logits.name] = held
            self._bind_output(self._logits.name, held)
        return held

    def _reserve(self, total: int) -> None:
        """Make room for `total` tokens per row; doubles, so that growing is rare."""
        if total <= self._capacity:
            return
        old = self._capacity
        wanted = max(total, 2 * old)
        self._capacity = -(-wanted // _CAPACITY_STEP) * _CAPACITY_STEP
        mask = np.ones((self._batch, self._capacity), np.int64)
        mask[:, :old] = self._mask
        self._mask = mask
        for past, present in self._pairs:
            shape, axis = _cache_shape(past, self._batch, self._capacity)
            # Zeros are only committed by the system once they are written.
            cache = np.zeros(shape, past.dtype)
            if old:
                filled = (slice(None),) * axis + (slice(self._length),)
                cache[filled] = self._buffers[past.name][filled]
            self._buffers[past.name] = cache
            self._bind_input(past.name, cache)
            self._bind_output(present.name, cache)

    def _bind_input(self, name: str, array: npt.NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: npt.NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class _State:
    """A cache of fixed size: what the last call left, and where the next one writes.

    Args:
        past: The name of the input.
        present: The name of the output.
        empty: What it holds before the first token.
    """

    def __init__(self, past: str, present: str, empty: npt.NDArray[Any]) -> None:
        self.past = past
        self.present = present
        self.held = empty
        self.next = np.empty_like(empty)

    def turn(self) -> None:
        """What was written becomes what is read."""
        self.held, self.next = self.next, self.held


def grows_in_place(signature: Signature) -> bool:
    """Whether a model appends to its caches in place: they go in and come out in one shape."""
    return all(past.shape == present.shape for past, present in signature.cache_pairs())


def _cache_shape(value: ValueInfo, batch: int, capacity: int) -> tuple[tuple[int, ...], int]:
    """The shape of a cache, and the axis that holds the tokens: the symbolic one but the first."""
    axis = next(i for i, size in enumerate(value.shape) if i and isinstance(size, str))
    before, after = _sizes(value.shape[1:axis]), _sizes(value.shape[axis + 1 :])
    return (batch, *before, capacity, *after), axis


def _sizes(shape: tuple[int | str, ...]) -> list[int]:
    return [size for size in shape if isinstance(size, int)]
