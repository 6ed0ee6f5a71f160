"""From a Hugging Face model to a `Program`: traced on the meta device, weights streamed later.

The trace takes ``(input_ids, attention_mask, position_ids, past keys and values)`` with symbolic
batch, query and past, so that one graph serves prefill and decode. Only public registries of
transformers are used: the attention interface, so that attention arrives as one operator instead
of a decomposition, and its mask twin. Whatever a model does not route through them is recognized
later, on ATen.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from qcompile.errors import ModelError
from qcompile.frontends.checkpoint import open_checkpoint
from qcompile.frontends.checkpoint_names import define_weights
from qcompile.frontends.config import (
    check_config_file,
    import_transformers,
    library_failures,
    load_config,
)
from qcompile.frontends.quantized import dequantized_source
from qcompile.frontends.sequence_kernels import LastState, whole_sequences
from qcompile.frontends.symbolic_trace import SymbolicTracer, Trace
from qcompile.frontends.torch_export import QUIETABLE, evaluation_mode
from qcompile.frontends.traced_cache import (
    CachePlan,
    Slot,
    TracedCache,
    cache_argument,
    growing_cache,
    plan_cache,
)
from qcompile.frontends.transformers_registries import (
    asks_for_attention,
    functional_rotary_scaling,
    own_attention,
    whole_operators,
)
from qcompile.ir.program import Program
from qcompile.ir.types import Port, Provenance, Role, Signature
from qcompile.ir.weights import MemorySource, TensorSource, WeightStore

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

UNTRACEABLE = (ModelError, *QUIETABLE)
"""What a trace raises that cannot follow a model."""

_SHOWN = 4
"""How many of the conditions on sizes that a trace met are named in a note."""

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
    check_config_file(path)
    checkpoint = open_checkpoint(path)
    config = load_config(path, tensors=len(checkpoint.specs()))
    source = dequantized_source(checkpoint, config.to_dict(), allow=dequantize)
    assets = {name: (path / name).read_bytes() for name in ASSETS if (path / name).is_file()}
    return capture_shell(build_shell(config), source, name=path.name, assets=assets)


def capture_model(model: PreTrainedModel) -> Program:
    """Captures a model that is in memory; its weights are read where they are.

    Args:
        model: Any dtype; the program computes in float32.
    """
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    source = MemorySource(tensors, identity=type(model).__name__)
    shell = build_shell(model.config, type(model))
    return capture_shell(shell, source, name=type(model).__name__, assets={})


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

    Raises:
        ModelError: If transformers cannot build a model from it.
    """
    try:
        model = _construct(config, model_class)
    except library_failures() as error:
        raise ModelError(
            f"transformers cannot build a model from the configuration of "
            f"'{config.name_or_path or config.model_type}': {error}",
            remedy="check config.json, or fetch the model again",
        ) from error
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


def _construct(
    config: PretrainedConfig, model_class: type[PreTrainedModel] | None
) -> PreTrainedModel:
    transformers = import_transformers()
    if model_class is None:
        names = getattr(config, "architectures", None) or []
        model_class = next((c for n in names if (c := getattr(transformers, n, None))), None)
    make = transformers.AutoModelForCausalLM.from_config
    if model_class is not None:
        make = model_class._from_config
    with _parameters_on_meta():
        model: PreTrainedModel = make(config, dtype=torch.float32)
    return model


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
    program = _trace_model(shell.model, store, canonical)
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


def _trace_model(
    model: PreTrainedModel, store: WeightStore, canonical: Mapping[str, str]
) -> Program:
    """Traces with its cache if the model keeps one that can be followed, else without."""
    reason = None
    if _may_keep_cache(model):
        try:
            return _trace_with_cache(model, store.copy(), canonical)
        except UNTRACEABLE:
            pass  # then it keeps more than keys and values
        try:
            return _trace_with_cache(model, store.copy(), canonical, _plan_cache(model))
        except UNTRACEABLE as error:
            reason = _first_line(error)
    program = _trace_plain(model, store, canonical)
    if reason is not None:
        note = f"captured without its cache, so that it cannot generate: {reason}"
        program = replace(program, notes=(*program.notes, note))
    return program


def _plan_cache(model: PreTrainedModel) -> CachePlan:
    with evaluation_mode(model), own_attention(model):
        return plan_cache(model)


def _trace_with_cache(
    model: PreTrainedModel,
    store: WeightStore,
    canonical: Mapping[str, str],
    plan: CachePlan | None = None,
) -> Program:
    """Traces over a past of what the plan says, or else of keys and values, as most models keep."""
    tracer = SymbolicTracer("batch", "query", "past")
    arguments = _arguments(model)
    if Role.ATTENTION_MASK.value not in arguments:
        raise ModelError("its forward takes no attention_mask")
    inputs = dict.fromkeys(arguments, ("batch", "query"))
    inputs[Role.ATTENTION_MASK.value] = ("batch", "past + query")
    argument = cache_argument(model)
    if argument is None:
        raise ModelError("its forward takes no cache")
    slots: list[Slot] = []

    def call(**tensors: Tensor) -> list[Tensor]:
        ids, mask = tensors[Role.INPUT_IDS.value], tensors[Role.ATTENTION_MASK.value]
        traced = _cache(plan, ids, mask.shape[1] - ids.shape[1])
        if plan is not None and not plan.grows:
            # Nobody looks back at single tokens: the mask is of the new ones.
            tensors[Role.ATTENTION_MASK.value] = mask[:, -ids.shape[1] :]
        states = LastState()
        states.watch(traced.cache)
        with whole_sequences(model, states):
            output = model(**tensors, **{argument: traced.cache}, use_cache=True)
        slots[:] = traced.slots
        given = [traced.given[slot] for slot in slots]
        return [output.logits, *map(traced.grown, slots), *given]

    trace = _trace(tracer, model, inputs, call, store, canonical)
    if not slots:
        raise ModelError("it keeps no growing keys and values")
    _results_to_inputs(trace.graph, len(slots))
    ports = tuple(Port(argument, Role(argument)) for argument in arguments)
    return Program(
        trace.graph,
        store,
        Signature(
            ports + _cache_ports(slots, "past_key_values", "past"),
            (Port("logits", Role.LOGITS), *_cache_ports(slots, "present", "present")),
        ),
        notes=_notes(trace),
    )


def _trace_plain(
    model: PreTrainedModel, store: WeightStore, canonical: Mapping[str, str]
) -> Program:
    tracer = SymbolicTracer("batch", "query")
    arguments = _arguments(model)
    options = {"use_cache": False} if _accepts(model, "use_cache") else {}

    def call(**tensors: Tensor) -> list[Tensor]:
        with whole_sequences(model, LastState()):
            return list(_tensors_of(model(**tensors, **options)))

    inputs = dict.fromkeys(arguments, ("batch", "query"))
    try:
        trace = _trace(tracer, model, inputs, call, store, canonical)
    except UNTRACEABLE as error:
        raise ModelError(
            f"{type(model).__name__} cannot be traced: {_first_line(error)}",
            remedy="capture it as a module: qcompile.capture(model, example_inputs=...)",
        ) from error
    ports = tuple(Port(argument, Role(argument)) for argument in arguments)
    outputs = _plain_outputs(model, trace.graph)
    return Program(trace.graph, store, Signature(ports, outputs), notes=_notes(trace))


def _trace(
    tracer: SymbolicTracer,
    model: PreTrainedModel,
    inputs: Mapping[str, tuple[str, ...]],
    call: Callable[..., list[Tensor]],
    store: WeightStore,
    canonical: Mapping[str, str],
) -> Trace:
    """Traces with attention and experts as whole operators, or as the model spells them."""

    def run() -> Trace:
        return tracer.trace(model, inputs, call, store, lambda name: canonical.get(name, name))

    with evaluation_mode(model), functional_rotary_scaling(model):
        if asks_for_attention(model):
            try:
                with whole_operators(model):
                    trace = run()
                if _uses_our_attention(trace.graph):
                    return trace
            except NotImplementedError:
                pass  # attention with arguments that the operator does not have
        with own_attention(model):
            return run()


def _uses_our_attention(graph: fx.Graph) -> bool:
    """Whether attention is our operator throughout.

    Where a model does not ask the registry, masks made for our attention are misread: they are
    boolean, and the model may add them.
    """
    add = torch.ops.aten.add.Tensor
    return any(node.target is torch.ops.qc.attention.default for node in graph.nodes) and not any(
        node.target is add and len({_is_boolean(n) for n in node.all_input_nodes}) == 2
        for node in graph.nodes
    )


def _is_boolean(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _results_to_inputs(graph: fx.Graph, count: int) -> None:
    """Makes the last `count` results inputs: they stand for tensors that a caller gives."""
    output = next(reversed(graph.nodes))
    results: Any = output.args[0]
    output.args = (results[:-count],)
    anchor = next(node for node in graph.nodes if node.op != "placeholder")
    for i, result in enumerate(results[-count:]):
        with graph.inserting_before(anchor):
            given = graph.placeholder(f"past_{i}")
        given.meta = dict(result.meta)
        result.replace_all_uses_with(given)
        graph.erase_node(result)


def _notes(trace: Trace) -> tuple[str, ...]:
    if not trace.assumptions:
        return ()
    shown = sorted(trace.assumptions, key=len)[:_SHOWN]
    more = len(trace.assumptions) - len(shown)
    rest = f", and {more} longer conditions" if more else ""
    return (f"traced for sizes where {', '.join(shown)}{rest}",)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _cache(plan: CachePlan | None, ids: Tensor, past: Any) -> TracedCache:
    return growing_cache(past) if plan is None else plan.start(ids, past)


def _cache_ports(slots: list[Slot], prefix: str, when: str) -> tuple[Port, ...]:
    return tuple(
        Port(
            f"{prefix}.{slot.layer}.{slot.kind}",
            Role(f"{when}_{slot.kind if slot.grows else 'state'}"),
            slot.layer,
        )
        for slot in slots
    )


def _plain_outputs(model: PreTrainedModel, graph: torch.fx.Graph) -> tuple[Port, ...]:
    """Ports of a model without a cache; a first output as wide as the vocabulary is logits."""
    results: Any = next(reversed(graph.nodes)).args[0]
    vocabulary = getattr(model.config, "vocab_size", None)
    ports = []
    for i, result in enumerate(results):
        shape = result.meta["val"].shape
        is_logits = i == 0 and len(shape) == 3 and shape[-1] == vocabulary
        ports.append(Port("logits", Role.LOGITS) if is_logits else Port(f"output_{i}", Role.TENSOR))
    return tuple(ports)


def _arguments(model: PreTrainedModel) -> tuple[str, ...]:
    """Which of the known inputs the model's forward takes."""
    if not _accepts(model, Role.INPUT_IDS.value):
        raise ModelError(
            f"{type(model).__name__} does not take input_ids",
            remedy="capture it as a module: qcompile.capture(model, example_inputs=...)",
        )
    wanted = [Role.INPUT_IDS, Role.ATTENTION_MASK]
    if _generates(model):
        wanted.append(Role.POSITION_IDS)
    elif getattr(model.config, "type_vocab_size", 0):
        wanted.append(Role.TOKEN_TYPE_IDS)
    return tuple(role.value for role in wanted if _accepts(model, role.value))


def _accepts(model: PreTrainedModel, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _generates(model: PreTrainedModel) -> bool:
    """Whether the model generates text; encoders accept a cache and positions too."""
    can_generate = getattr(type(model), "can_generate", None)
    return bool(can_generate and can_generate())


def _may_keep_cache(model: PreTrainedModel) -> bool:
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    return _generates(model) and cache_argument(model) is not None and not is_encoder_decoder


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

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
