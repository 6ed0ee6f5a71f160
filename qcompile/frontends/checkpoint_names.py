"""Matching a model's parameters with the tensors of its checkpoint.

Names and layouts differ where a checkpoint was written by another version or for another class:
transformers publishes renamings and conversions (stacked experts, split projections) per model,
and they are used here, lazily: a converted weight is an expression over its source tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcompile.errors import ModelError
from qcompile.ir.weights import Apply, Expression, Source, TensorSource, TensorSpec, WeightStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def define_weights(
    model: PreTrainedModel, source: TensorSource
) -> tuple[WeightStore, dict[str, str]]:
    """A store with an entry for every tensor of the model.

    Shared parameters (tied embeddings) get one entry, under the first of their names that the
    checkpoint has.

    Args:
        model: On the meta device; only names, shapes and sharing are read.
        source: The checkpoint.

    Returns:
        The store, and a map from every qualified name in the model to its entry.

    Raises:
        ModelError: If a tensor is missing from the checkpoint, or has another shape there.
    """
    available = _available(model, source)
    store = WeightStore()
    canonical: dict[str, str] = {}
    missing: list[str] = []
    for names, tensor in _shared_groups(model):
        name = next((name for name in names if name in available), None)
        if name is None:
            missing.append(names[0])
            continue
        expression, spec = available[name]
        if spec.shape != tuple(tensor.shape):
            raise ModelError(
                f"tensor '{name}' in '{source.identity}' has shape {list(spec.shape)}, the model "
                f"needs {list(tensor.shape)}",
                remedy="check that config.json and checkpoint belong together",
            )
        visible = torch.float32 if tensor.dtype.is_floating_point else spec.dtype
        store.define(name, expression, TensorSpec(spec.shape, visible))
        canonical |= dict.fromkeys(names, name)
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ModelError(
            f"'{source.identity}' lacks {len(missing)} tensors that {type(model).__name__} needs: "
            f"{shown}",
            remedy="check that config.json and checkpoint belong together",
        )
    return store, canonical


def _shared_groups(model: PreTrainedModel) -> list[tuple[list[str], Tensor]]:
    """Every distinct tensor that a checkpoint should hold, with all of its names."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(groups.values())


def _available(
    model: PreTrainedModel, source: TensorSource
) -> dict[str, tuple[Expression, TensorSpec]]:
    """What the checkpoint offers, under the model's names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    state = model.state_dict(keep_vars=True)
    specs = source.specs()
    available: dict[str, tuple[Expression, TensorSpec]] = {}
    gathered: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(specs, key=_natural):
        renamed, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        if renamed not in state and key in state:
            renamed, pattern = key, None
        if pattern is None:
            available[renamed] = (Source(source, key), specs[key])
        elif renamed in state:
            gathered.setdefault(renamed, []).append((pattern, key))
    for renamed, parts in gathered.items():
        available |= _converted(model, source, by_pattern[parts[0][0]], renamed, parts)
    return available


def _converted(
    model: PreTrainedModel,
    source: TensorSource,
    converter: Any,
    target: str,
    parts: list[tuple[str, str]],
) -> dict[str, tuple[Expression, TensorSpec]]:
    """The outputs of one conversion, as expressions over its source tensors."""
    operands = tuple(Source(source, key) for _, key in parts)

    def run(*tensors: Tensor) -> Mapping[str, Tensor]:
        fresh = copy.deepcopy(converter)
        for (pattern, key), tensor in zip(parts, tensors, strict=True):
            fresh.add_tensor(target, key, pattern, tensor)
        outputs = fresh.convert(target, model=model, config=model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in outputs.items()}

    def output(name: str) -> Callable[..., Tensor]:
        return lambda *tensors: run(*tensors)[name]

    specs = source.specs()
    example = [
        torch.empty(specs[key].shape, dtype=specs[key].dtype, device="meta") for _, key in parts
    ]
    return {
        name: (Apply(output(name), operands, exact=True, label="convert"), TensorSpec.of(value))
        for name, value in run(*example).items()
    }


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts ``experts.10`` after ``experts.9``."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
