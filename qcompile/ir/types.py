"""The small values that describe a program: facts, ports, signatures, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.utils._pytree as pytree


class Fact(Enum):
    """What is known to hold of a program; passes require facts and ensure them."""

    CANONICAL = "canonical"
    """One spelling per meaning: no aliases, no no-op casts, every dense layer an `aten.linear`."""
    CACHE_OWNED = "cache_owned"
    """Every growing key/value tensor is a `qc.kv_append`."""
    RAISED = "raised"
    """Norms, rotary embeddings, attention and activations are single dialect operators."""
    GAINS_FOLDED = "gains_folded"
    """Norm gains have been multiplied into the layers that follow."""
    WEIGHTS_QUANTIZED = "weights_quantized"
    """Codes have been chosen: no transform can be absorbed any more."""
    LOWERED = "lowered"
    """Every node is an operator that the target runs."""


class Role(str, Enum):
    """What an input or output of a program means to the one who runs it."""

    INPUT_IDS = "input_ids"
    ATTENTION_MASK = "attention_mask"
    POSITION_IDS = "position_ids"
    TOKEN_TYPE_IDS = "token_type_ids"
    PAST_KEY = "past_key"
    PAST_VALUE = "past_value"
    PAST_STATE = "past_state"
    LOGITS = "logits"
    PRESENT_KEY = "present_key"
    PRESENT_VALUE = "present_value"
    PRESENT_STATE = "present_state"
    LOGIT_POSITIONS = "logit_positions"
    TENSOR = "tensor"


PAST_ROLES = frozenset({Role.PAST_KEY, Role.PAST_VALUE, Role.PAST_STATE})
"""Inputs that hold what earlier tokens left: what grows with them, and states of fixed size."""

PRESENT_ROLES = frozenset({Role.PRESENT_KEY, Role.PRESENT_VALUE, Role.PRESENT_STATE})
"""Outputs that take the place of those inputs in the next call."""


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        name: Unique among the inputs, or among the outputs.
        role: Its meaning.
        layer: The decoder layer, for cache tensors.
    """

    name: str
    role: Role = Role.TENSOR
    layer: int | None = None


@dataclass(frozen=True)
class Signature:
    """How a program is called and what it returns.

    Attributes:
        inputs: In the order of the graph's placeholders.
        outputs: In the order of the graph's results.
        input_tree: For plain modules, the structure of ``(args, kwargs)``.
        output_tree: For plain modules, the structure of what the model returns.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    input_tree: pytree.TreeSpec | None = None
    output_tree: pytree.TreeSpec | None = None

    def has(self, role: Role) -> bool:
        """Whether some input or output plays a role."""
        return any(port.role is role for port in (*self.inputs, *self.outputs))

    @property
    def is_causal_lm(self) -> bool:
        """Whether tokens go in, and next-token logits come out with what later tokens need."""
        keeps_past = any(port.role in PAST_ROLES for port in self.inputs)
        return self.has(Role.INPUT_IDS) and self.has(Role.LOGITS) and keeps_past

    @property
    def layers(self) -> int:
        """Number of layers that keep a cache."""
        return len({port.layer for port in self.inputs if port.role in PAST_ROLES})


@dataclass(frozen=True)
class Provenance:
    """Where a program came from.

    Attributes:
        name: A short name for reports.
        source: Path or identity of the model.
        architecture: The model's own name for its architecture, for reports only.
        fingerprint: Hash of the checkpoint, or an empty string.
        stored_bytes: Size of the checkpoint's tensors as stored.
        config: The model's configuration, for the tokenizer and generation settings only;
            no pass may read it.
        assets: Small files for the artifact (tokenizer, generation settings): name to contents.
    """

    name: str = "model"
    source: str = ""
    architecture: str = ""
    fingerprint: str = ""
    stored_bytes: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    assets: Mapping[str, bytes] = field(default_factory=dict)


class ProgramOutput(tuple[torch.Tensor, ...]):
    """What a language model program returns: the logits, then the cache's tensors in order."""

    @property
    def logits(self) -> torch.Tensor:
        """``[B, S, V]``."""
        return self[0]

    @property
    def past_key_values(self) -> tuple[torch.Tensor, ...]:
        """What each layer keeps, flat: keys and values ``[B, H, T, D]``, states ``[B, ...]``."""
        return tuple(self[1:])
