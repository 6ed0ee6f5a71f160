"""What a method made of a weight, as an entry of the journal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.formats import Format, QuantizedWeight, parse_format
from qcompile.passes.quantize.methods import Outcome

_TENSOR = "tensor."


def pack_outcome(outcome: Outcome, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """An outcome and some facts as tensors by name; see `unpack_outcome`.

    Args:
        outcome: Its notes are kept, too.
        facts: What JSON can write.
    """
    text = json.dumps(
        {"format": str(outcome.weight.format), "notes": outcome.notes, "facts": facts}
    )
    entry = {_TENSOR + name: tensor for name, tensor in outcome.weight.tensors.items()}
    return entry | {"text": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def unpack_outcome(
    format: Format, shape: tuple[int, ...], entry: Mapping[str, Tensor]
) -> tuple[Outcome, dict[str, Any]]:
    """The outcome and the facts of an entry.

    Args:
        format: What the weight was to be stored as; the method may have divided its columns.
        shape: Of the weight.
        entry: What `pack_outcome` made.
    """
    text = json.loads(bytes(entry["text"].tolist()))
    if text["format"] != str(format):
        format = parse_format(text["format"])
    tensors = {k.removeprefix(_TENSOR): t for k, t in entry.items() if k.startswith(_TENSOR)}
    return Outcome(QuantizedWeight(format, shape, tensors), tuple(text["notes"])), text["facts"]
