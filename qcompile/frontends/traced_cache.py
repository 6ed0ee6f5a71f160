"""The cache of a model while the model is traced: empty pasts in, what it makes of them out.

Most decoders keep keys and values that grow; some keep states of fixed size beside or instead of
them: the last inputs of a short convolution, the matrix of a recurrence. What a cache holds is
found by running the model twice without numbers, on texts of two sizes: what is then as long as
the text grows, what is not is a state. Names and classes of models are not asked.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import qcompile.ir.dialect  # noqa: F401  (registers the operator that grows a cache)
from qcompile.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_ARGUMENTS = ("past_key_values", "cache_params")
"""What transformers calls the cache among the arguments of a forward, and in what it returns."""

Path = tuple[str | int, ...]
"""Attributes, keys and indices that lead to a value within an object."""

_GROWING = ("keys", "values")
"""Attributes of a layer that hold something for each token."""

_PROBES = ((2, 5), (3, 7))
"""Rows and tokens of the two texts."""


@dataclass(frozen=True)
class Slot:
    """A place of a cache, and the tensor that is found there.

    Attributes:
        path: The way from the cache to the tensor.
        shape: Its sizes behind the batch; None is the length of the text.
        dtype: Of its numbers.
    """

    path: Path
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    @property
    def layer(self) -> int:
        """The decoder layer: the first number on the path."""
        return next((step for step in self.path if isinstance(step, int)), 0)

    @property
    def grows(self) -> bool:
        """Whether it holds something for each token, as keys and values do."""
        return None in self.shape

    @property
    def kind(self) -> str:
        """What it is called within its layer: ``key``, ``value``, or ``conv_states.0``."""
        if self.grows:
            return str(self.path[-1]).removesuffix("s")
        position = self.path.index(self.layer)
        rest = self.path[position + 1 :] or self.path[:position]
        return ".".join(map(str, rest))

    def put(self, cache: Any, value: Tensor) -> None:
        """Lets another tensor stand there."""
        holder: Any = _reach(cache, self.path[:-1])
        last = self.path[-1]
        if _is_container(holder):
            holder[last] = value
        else:
            setattr(holder, str(last), value)


@dataclass(frozen=True)
class TracedCache:
    """A cache within a trace.

    Attributes:
        cache: What the model is given.
        given: What stood at each place before the call. These tensors hold no numbers: who traces
            turns them into inputs.
    """

    cache: Any
    given: dict[Slot, Tensor]

    @property
    def slots(self) -> list[Slot]:
        """All places, by layer."""
        return sorted(self.given, key=lambda slot: slot.layer)

    def grown(self, slot: Slot) -> Tensor:
        """What stands at a place now."""
        value: Tensor = _reach(self.cache, slot.path)
        return value


@dataclass(frozen=True)
class CachePlan:
    """What a model keeps from one call to the next.

    Attributes:
        argument: The argument of its forward that takes the cache.
        slots: All places with a tensor.
        filled: A cache of the model's own class that holds a text; its tensors have no numbers.
    """

    argument: str
    slots: tuple[Slot, ...]
    filled: Any

    @property
    def grows(self) -> bool:
        """Whether it holds something for each token, beside states or alone."""
        return any(slot.grows for slot in self.slots)

    def start(self, ids: Tensor, past: Any) -> TracedCache:
        """A cache that stands at `past` tokens per row, for one call of the model.

        Args:
            ids: The ids of the call, from which the batch is taken.
            past: A symbolic size.
        """
        held = [value for _, value in _leaves(self.filled) if isinstance(value, Tensor)]
        cache = copy.deepcopy(self.filled, {id(tensor): tensor for tensor in held})
        given = {}
        for slot in self.slots:
            sizes = (past if size is None else size for size in slot.shape)
            given[slot] = ids.new_empty((ids.shape[0], *sizes), dtype=slot.dtype)
            # A model may write a state where it stands; what was given stays as it is.
            slot.put(cache, given[slot] if slot.grows else given[slot].clone())
        for layer in {slot.path[:-1] for slot in self.slots if slot.grows}:
            _let_grow(_reach(cache, layer), past)
        return TracedCache(cache, given)


def plan_cache(model: PreTrainedModel) -> CachePlan:
    """Finds out what a model keeps, by running it without numbers.

    Args:
        model: Its parameters on the meta device.

    Raises:
        ModelError: If it keeps nothing, or tensors that neither grow with the text nor stay as
            they are.
    """
    argument = cache_argument(model)
    if argument is None:
        raise ModelError("its forward takes no cache")
    found = []
    for batch, length in _PROBES:
        ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
        with torch.no_grad():
            output = model(input_ids=ids, use_cache=True)
        found.append(getattr(output, argument, None))
    first, second = (dict(_leaves(cache)) for cache in found)
    if first.keys() != second.keys():
        raise ModelError("what its cache holds depends on the text")
    growing = {path[:-1] for path in first if path[-1] in _GROWING}
    slots = []
    for path, value in first.items():
        if path[:-1] in growing and path[-1] not in _GROWING:
            continue  # what a layer counts to know its window; in the trace it has none
        if isinstance(value, Tensor):
            slots.append(_slot(path, value, second[path]))
        elif value != second[path]:
            raise ModelError(f"its cache counts tokens outside tensors, in {_spelled(path)}")
    if not slots:
        raise ModelError("its cache holds nothing")
    return CachePlan(argument, tuple(slots), found[0])


def cache_argument(model: PreTrainedModel) -> str | None:
    """The argument of a model's forward that takes the cache; None if there is none."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in accepted), None)


def growing_cache(past: Any) -> TracedCache:
    """A cache of keys and values only, which holds `past` positions yet to be given.

    A layer's keys and values of the past are made when the layer is first reached, in the shape
    that they must have.

    Args:
        past: A symbolic size.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    given: dict[Slot, Tensor] = {}

    class Cache(DynamicCache):
        def update(
            self,
            key_states: Tensor,
            value_states: Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            while len(self.layers) <= layer_idx:
                self.layers.append(_let_grow(DynamicLayer(), past))
            layer: Any = self.layers[layer_idx]
            if not layer.is_initialized:
                layer.dtype, layer.device = key_states.dtype, key_states.device
                layer.is_initialized = True
                for name, states in (("keys", key_states), ("values", value_states)):
                    heads, width = states.shape[1], states.shape[3]
                    slot = Slot(("layers", layer_idx, name), (heads, None, width), states.dtype)
                    given[slot] = states.new_empty((states.shape[0], heads, past, width))
                    slot.put(self, given[slot])
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

        def get_seq_length(self, layer_idx: int = 0) -> Any:
            del layer_idx
            return past

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[Any, int]:
            del layer_idx
            return past + query_length, 0

    return TracedCache(Cache(), given)


def _let_grow(layer: Any, past: Any) -> Any:
    """A layer of keys and values that stands at a symbolic size, and grows by our operator.

    Left alone, it would make a number of that size, and cut what is outside of its window.
    """

    def update(new_keys: Tensor, new_values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        layer.keys = torch.ops.qc.kv_append(layer.keys, new_keys)
        layer.values = torch.ops.qc.kv_append(layer.values, new_values)
        return layer.keys, layer.values

    layer.update = update
    layer.get_seq_length = lambda: past
    layer.get_mask_sizes = lambda query_length: (past + query_length, 0)
    return layer


def _slot(path: Path, first: Tensor, second: Tensor) -> Slot:
    """A place, from what two texts left there."""
    if path[-1] in _GROWING and first.dim() == 4:
        # A window may have cut them: in the trace nothing does, and the mask says what is seen.
        return Slot(path, (first.shape[1], None, first.shape[3]), first.dtype)
    (batch, length), (other_batch, other_length) = _PROBES
    if (first.shape[:1], second.shape[:1]) != ((batch,), (other_batch,)):
        raise ModelError(f"its cache holds {_spelled(path)}, which is not one for each row")
    if first.shape[1:] != second.shape[1:]:
        raise ModelError(
            f"its cache holds {_spelled(path)}, whose shape changes with the text: "
            f"{list(first.shape[1:])} after {length} tokens, "
            f"{list(second.shape[1:])} after {other_length}"
        )
    return Slot(path, tuple(first.shape[1:]), first.dtype)


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Tensors and numbers within an object, with the way to each."""
    if isinstance(value, Tensor):
        if value.numel():
            yield path, value
    elif isinstance(value, (bool, int, float)):
        yield path, value
    else:
        for step, inner in _inside(value):
            yield from _leaves(inner, (*path, step))


def _inside(value: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif type(value).__module__.startswith("transformers.") and not isinstance(value, nn.Module):
        yield from vars(value).items()


def _reach(value: Any, path: Path) -> Any:
    """What stands at the end of a way."""
    for step in path:
        value = value[step] if _is_container(value) else getattr(value, str(step))
    return value


def _is_container(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple))


def _spelled(path: Path) -> str:
    return f"'{'.'.join(map(str, path))}'"
