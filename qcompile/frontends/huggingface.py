"""From a Hugging Face model to a `Program`: traced on the meta device, weights streamed later.

The trace takes ``(input_ids, attention_mask, position_ids, past keys and values)`` with symbolic
batch, query and past, so that one graph serves prefill and decode. Only public registries of
transformers are used: the attention interface, so that attention arrives as one operator instead
of a decomposition, and its mask twin. Whatever a model does not route through them is recognized
later, on ATen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import qcompile.ir.dialect  # noqa: F401  (registers qc::attention, which the trace calls)
from qcompile.errors import MissingExtraError, ModelError

from qcompile.frontends.checkpoint_names import define_weights
from qcompile.frontends.torch_export import evaluation_mode, export, unlifted_graph
from qcompile.ir.program import Program
from qcompile.ir.types import Port, Provenance, Role, Signature
from qcompile.ir.weights import MemorySource, TensorSource, WeightStore

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION = "qcompile"
"""The name under which our attention is registered with transformers while tracing."""

_BATCH, _QUERY, _PAST = 2, 3, 4
"""Traced sizes: all at least 2, since `torch.export` specializes 0 and 1, and all different."""

ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
"""Small files of a model directory that the artifact carries."""


def capture_directory(path: Path, *, dequantize: bool = False) -> Program:
    """Captures a model directory: ``config.json``, safetensors and tokenizer files.

    Args:
        path: The directory.
        dequantize: Whether to read an already quantized checkpoint as float weights.

    Raises:
        ModelError: If something is missing, damaged or not supported; says what.
    """
    from qcompile.frontends.quantized import dequantized_source

    config = load_config(path)
    from qcompile.frontends.checkpoint import open_checkpoint

    source: TensorSource = open_checkpoint(path)
    source = dequantized_source(source, config.to_dict(), allow=dequantize)
    assets = {name: (path / name).read_bytes() for name in ASSETS if (path / name).is_file()}
    return capture_shell(build_shell(config), source, name=path.name, assets=assets)


def capture_model(model: PreTrainedModel) -> Program:
    """Captures a model that is in memory; its weights are read where they are.

    Args:
        model: Any dtype; the program computes in float32.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    source = MemorySource(tensors, identity=type(model).__name__)
    shell = build_shell(model.config, type(model))
    return capture_shell(shell, source, name=type(model).__name__, assets={})


def load_config(path: Path) -> PretrainedConfig:
    """Reads ``config.json`` with transformers.

    Raises:
        MissingExtraError: If transformers is not installed.
        ModelError: If there is no config, or its model type is unknown.
    """
    transformers = import_transformers()
    if not (path / "config.json").is_file():
        raise ModelError(
            f"'{path}' has no config.json",
            remedy="pass a Hugging Face model directory, a hub id, or a .gguf file",
        )
    try:
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(path)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"'{path / 'config.json'}' cannot be used: {error}") from error
    return config


def import_transformers() -> Any:
    """The transformers package.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "transformers", extra="hf", purpose="read Hugging Face models"
        ) from error
    return transformers


@dataclass(frozen=True)
class Shell:
    """A model without weights.

    Attributes:
        model: Parameters and buffers on the meta device, in float32 and evaluation mode.
        buffers: The values of buffers that the constructor computed and no checkpoint has.
    """

    model: PreTrainedModel
    buffers: Mapping[str, Tensor]


def build_shell(
    config: PretrainedConfig, model_class: type[PreTrainedModel] | None = None
) -> Shell:
    """Constructs a model without allocating its parameters.

    Args:
        config: Its configuration.
        model_class: Its class; by default the one that the configuration names, or else the
            causal language model for its type.
    """
    transformers = import_transformers()
    if model_class is None:
        names = getattr(config, "architectures", None) or []
        model_class = next((c for n in names if (c := getattr(transformers, n, None))), None)
    with _parameters_on_meta():
        if model_class is not None:
            model = model_class._from_config(config, dtype=torch.float32)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    persistent = set(model.state_dict(keep_vars=True))
    buffers = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                qualified = f"{prefix}.{name}" if prefix else name
                if qualified not in persistent:
                    buffers[qualified] = buffer.detach()
                module._buffers[name] = buffer.to("meta")
    return Shell(model.eval(), buffers)


def capture_shell(
    shell: Shell, source: TensorSource, *, name: str, assets: Mapping[str, bytes]
) -> Program:
    """Traces a shell and ties its weights to a checkpoint.

    Args:
        shell: The model without weights.
        source: The numbers.
        name: For reports.
        assets: Files for the artifact.
    """
    store, canonical = define_weights(shell.model, source)
    for buffer_name, buffer in shell.buffers.items():
        if buffer_name not in store:
            store.put(buffer_name, buffer)
    with _attention_as_one_operator(shell.model):
        cache = _cache_shapes(shell.model)
        program = _trace(shell.model, cache, store, canonical)
    config = shell.model.config
    provenance = Provenance(
        name=name,
        source=source.identity,
        architecture=type(shell.model).__name__,
        fingerprint=source.fingerprint(),
        stored_bytes=sum(spec.bytes for spec in source.specs().values()),
        config=config.to_dict(),
        assets=assets,
    )
    return replace(program, provenance=provenance)


class _Flat(nn.Module):
    """The model as a function of flat tensors, with a cache that is given and returned."""

    def __init__(self, model: nn.Module, arguments: tuple[str, ...], layers: int) -> None:
        super().__init__()
        self.model = model
        self._arguments = arguments
        self._layers = layers

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self._arguments, tensors, strict=False))
        past = tensors[len(self._arguments) :]
        if not self._layers:
            output = self.model(**named)
            return tuple(value for value in _tensors_of(output))
        cache = import_transformers().DynamicCache()
        for layer in range(self._layers):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        output = self.model(**named, past_key_values=cache, use_cache=True)
        flat = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (output.logits, *flat)


def _trace(
    model: PreTrainedModel,
    cache: list[tuple[torch.Size, torch.Size]],
    store: WeightStore,
    canonical: Mapping[str, str],
) -> Program:
    arguments = _arguments(model, with_cache=bool(cache))
    flat = _Flat(model, arguments, len(cache))
    batch, query, past = (
        torch.export.Dim("batch", min=1),
        torch.export.Dim("query", min=1),
        torch.export.Dim("past", min=0),
    )
    tensors: list[Tensor] = []
    shapes: list[dict[int, Any]] = []
    for argument in arguments:
        total = _QUERY + (_PAST if cache and argument == Role.ATTENTION_MASK.value else 0)
        tensors.append(torch.ones(_BATCH, total, dtype=torch.int64, device="meta"))
        mixed = cache and argument == Role.ATTENTION_MASK.value
        shapes.append({0: batch, 1: torch.export.Dim.AUTO if mixed else query})
    for key, value in cache:
        for shape in (key, value):
            tensors.append(torch.empty(_BATCH, shape[1], _PAST, shape[3], device="meta"))
            shapes.append({0: batch, 2: past})
    exported = export(flat, tuple(tensors), {}, (tuple(shapes),), type(model).__name__)
    graph = unlifted_graph(
        exported, store, lambda name: _strip(name, canonical)
    )
    inputs = tuple(Port(argument, Role(argument)) for argument in arguments) + _cache_ports(
        len(cache), Role.PAST_KEY, Role.PAST_VALUE, "past_key_values"
    )
    if cache:
        outputs = (Port("logits", Role.LOGITS),) + _cache_ports(
            len(cache), Role.PRESENT_KEY, Role.PRESENT_VALUE, "present"
        )
    else:
        outputs = _plain_outputs(model, graph)
    return Program(graph, store, Signature(inputs, outputs))


def _strip(name: str, canonical: Mapping[str, str]) -> str:
    name = name.removeprefix("model.")
    return canonical.get(name, name)


def _cache_ports(layers: int, key: Role, value: Role, prefix: str) -> tuple[Port, ...]:
    return tuple(
        Port(f"{prefix}.{layer}.{kind}", role, layer)
        for layer in range(layers)
        for kind, role in (("key", key), ("value", value))
    )


def _plain_outputs(model: PreTrainedModel, graph: torch.fx.Graph) -> tuple[Port, ...]:
    """Ports of a model without a cache: the first output is logits if it is as wide as a vocabulary."""
    results: Any = next(reversed(graph.nodes)).args[0]
    vocabulary = getattr(model.config, "vocab_size", None)
    ports = []
    for i, result in enumerate(results):
        shape = result.meta["val"].shape
        is_logits = i == 0 and len(shape) == 3 and shape[-1] == vocabulary
        ports.append(
            Port("logits", Role.LOGITS) if is_logits else Port(f"output_{i}", Role.TENSOR)
        )
    return tuple(ports)


def _arguments(model: PreTrainedModel, *, with_cache: bool) -> tuple[str, ...]:
    """Which of the known inputs the model's forward takes."""
    import inspect

    accepted = inspect.signature(model.forward).parameters
    names = [Role.INPUT_IDS.value]
    if Role.ATTENTION_MASK.value in accepted:
        names.append(Role.ATTENTION_MASK.value)
    if with_cache and Role.POSITION_IDS.value in accepted:
        names.append(Role.POSITION_IDS.value)
    if Role.TOKEN_TYPE_IDS.value in accepted and not with_cache:
        names.append(Role.TOKEN_TYPE_IDS.value)
    if Role.INPUT_IDS.value not in accepted:
        raise ModelError(
            f"{type(model).__name__} does not take input_ids",
            remedy="capture it as a module: qcompile.capture(model, example_inputs=...)",
        )
    return tuple(names)


def _cache_shapes(model: PreTrainedModel) -> list[tuple[torch.Size, torch.Size]]:
    """Shapes of keys and values per layer, seen by running the model on the meta device.

    An empty list means that the model keeps no growing cache.
    """
    import inspect

    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return []
    if getattr(model.config, "is_encoder_decoder", False) or not _is_decoder(model):
        return []
    cache = import_transformers().DynamicCache()
    ids = torch.zeros(_BATCH, _QUERY, dtype=torch.int64, device="meta")
    with torch.no_grad(), evaluation_mode(model):
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            use_cache=True,
        )
    shapes = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4 or keys.shape[2] != _QUERY:
            return []
        shapes.append((keys.shape, values.shape))
    return shapes


def _is_decoder(model: PreTrainedModel) -> bool:
    """Whether the class generates text; encoders accept a cache too, and ignore it."""
    can_generate = getattr(type(model), "can_generate", None)
    return bool(can_generate and can_generate())


def _tensors_of(output: Any) -> Iterator[Tensor]:
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if not isinstance(values, Tensor) else (values,):
        if isinstance(value, Tensor):
            yield value


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside live on the meta device; buffers are computed for real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            module._parameters[name] = nn.Parameter(
                param.to("meta"), requires_grad=param.requires_grad
            )

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextlib.contextmanager
def _attention_as_one_operator(model: PreTrainedModel) -> Iterator[None]:
    """While inside, the model's attention is `qc.attention`, where the model lets it be."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)
    configs = _configs(model.config)
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    nested = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    return [config] + [found for child in nested if child is not None for found in _configs(child)]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **rest: object,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls, as one operator."""
    del dropout, rest
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if position_bias is not None:
        attention_mask = _with_bias(attention_mask, position_bias)
    output = torch.ops.qc.attention(
        query,
        key,
        value,
        attention_mask,
        None,
        s_aux,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        is_causal and attention_mask is None,
        0,
        float(softcap or 0.0),
    )
    return output.transpose(1, 2), None


def _with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The boolean mask, always spelled out, so that it can be recognized by probing."""
    from transformers.masking_utils import sdpa_mask

    kwargs["allow_is_causal_skip"] = False
    kwargs["allow_is_bidirectional_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask
